"""The tests are many small problems: one thread each, or most of their time would go into waiting for threads."""

import torch

torch.set_num_threads(1)
