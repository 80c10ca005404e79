"""Set before any test module is imported.

Triton reads TRITON_INTERPRET when a kernel is decorated, its own library functions included, so it must be there before whoever imports
Triton first (a test of another folder, by way of transformers or deepspeed).
"""

import os

os.environ["TRITON_INTERPRET"] = "1"
