"""What all tests share: one thread, and property tests that draw the same examples every time."""
import torch
from hypothesis import settings

torch.set_num_threads(1)
settings.register_profile("ibma", derandomize=True, deadline=None, max_examples=100, database=None)
settings.load_profile("ibma")
