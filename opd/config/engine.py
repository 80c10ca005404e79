"""What generates, as a typed, frozen tree."""

from typing import Literal

from pydantic import Field, model_validator

from opd.config.base import Frozen, NonNegative, Positive


class Engine(Frozen):
    """What generates. `engine: vllm` is short for `engine: {kind: vllm}`; the keys after audit_nats are vLLM's."""

    kind: Literal["torch", "process", "vllm"] = Field(
        default="torch",
        description="torch: in process, around the unmodified Hugging Face module; process: the same in a process of its own; vllm: in Ray actors",
    )
    stall_seconds: float = Field(default=300.0, gt=0, description="a process engine without a forward pass for so long is replaced, seconds")
    token_budget: Positive = Field(default=32768, description="tokens (rows x longest, cache included) held at once while generating")
    audit_nats: float = Field(default=0.01, gt=0, description="largest mean |log-prob difference| between engine and learner at start, nats")
    replicas: Positive = Field(default=1, description="engines that share out a step's prompts (kinds process and vllm)")
    tensor_parallel: Positive = Field(default=1, description="GPUs that share one actor's model; processes, where there are none")
    mode: Literal["auto", "async", "offline"] = Field(
        default="auto", description="async: vLLM in its own process, can pause in mid-answer; offline: in the actor; auto: async on GPUs or ahead"
    )
    placement: Literal["separate", "colocated"] = Field(
        default="separate", description="separate: actors have GPUs of their own; colocated: they share the learner's and sleep while it learns"
    )
    positions: NonNegative = Field(default=0, description="longest sequence of an actor, tokens; 0: twice prompt and answer, at most the model's")
    memory_share: float = Field(default=0.85, gt=0, lt=1, description="share of a GPU's memory for an actor (weights and cache)")
    kv_bytes: Positive = Field(default=64 << 20, description="bytes of an actor's key-value cache on a CPU")
    chunk: Positive = Field(default=64, description="requests that an actor is given at once, at most")
    deadline_seconds: float = Field(default=600.0, gt=0, description="a chunk, a weight update or a start that takes longer restarts the actor")
    straggler_factor: float = Field(default=4.0, gt=1, description="a chunk that takes so many times the median is given to an idle actor too")
    restarts: NonNegative = Field(default=10, description="restarts of one actor before the run goes on without it")
    lora: Literal["merged", "adapters"] = Field(
        default="merged", description="a LoRA student's weights for vLLM: merged and whole, or its factors alone, over the base model's folder"
    )
    transfer: Literal["auto", "shared_memory", "nccl", "ipc"] = Field(
        default="auto",
        description="how weights reach the actors: a file in `exchange`, NCCL between GPUs, CUDA IPC on shared ones; auto: IPC for colocated actors "
        "where it can be had, else the file where all actors see it",
    )
    exchange: str = Field(default="/dev/shm", description="folder for a version of the weights on its way to the actors, as large as one")

    @property
    def num_gpus(self) -> int:
        """GPUs of the student's actors, where there are any."""
        return self.replicas * self.tensor_parallel

    @model_validator(mode="after")
    def _parallel_is_vllm_s(self) -> "Engine":
        if self.tensor_parallel > 1 and self.kind != "vllm":
            raise ValueError(
                f"engine.tensor_parallel={self.tensor_parallel} is vLLM's, and engine.kind is {self.kind}: use engine=vllm, or leave it out"
            )
        return self

    @model_validator(mode="after")
    def _transfer_fits(self) -> "Engine":
        if self.transfer != "auto" and self.kind != "vllm":
            raise ValueError(f"engine.transfer={self.transfer} is vLLM's, and engine.kind is {self.kind}: use engine=vllm, or leave it out")
        if self.transfer == "nccl" and self.placement == "colocated":
            raise ValueError(
                "engine.transfer=nccl with engine.placement=colocated: a GPU cannot have two members in one NCCL group, and colocated actors share "
                "the learner's: use engine.transfer=shared_memory (or auto), or engine.placement=separate"
            )
        if self.transfer == "ipc" and self.placement != "colocated":
            raise ValueError(
                "engine.transfer=ipc hands over memory of the GPU that learner and actor share: use engine.placement=colocated, or "
                "engine.transfer=nccl (or auto) for actors with GPUs of their own"
            )
        if self.transfer in ("nccl", "ipc") and self.lora == "adapters":
            raise ValueError(
                f"engine.transfer={self.transfer} sends whole weights, and engine.lora=adapters factors alone, as a file: use "
                "engine.transfer=shared_memory (or auto), or engine.lora=merged"
            )
        return self
