"""Where every token of a batch of sequences lies: all index arithmetic of the project.

Legend: R rows, S tokens a row, N completion tokens.
"""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenLayout:
    """Whole sequences (context then completion), padded on the right or packed into one row.

    input_ids, position_ids [R, S]; attention_mask [R, S] (1 for real tokens) or None when packed (positions restart at every sequence).
    predict_at [N]: flat row of the hidden states [R*S, D] that predicts completion token n. token, sequence, position [N] int64;
    sequence counts within this layout, position within the completion.

    Example: context (5, 6, 7), completion (8, 9, 2) -> input_ids [[5, 6, 7, 8, 9, 2]], predict_at [2, 3, 4], token [8, 9, 2], position [0, 1, 2].
    """

    input_ids: Tensor
    position_ids: Tensor
    attention_mask: Tensor | None
    predict_at: Tensor
    token: Tensor
    sequence: Tensor
    position: Tensor
    num_sequences: int
