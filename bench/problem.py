"""What every kind of problem has, whatever it measures."""

import torch

# As attributes of a NamedTuple with op, name, batch and dtype, which cannot inherit them.
problem_id = property(lambda self: f"{self.op}/{self.name}-b{self.batch}-{self.dtype}")
problem_dtype = property(lambda self: getattr(torch, self.dtype))
