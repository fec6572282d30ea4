"""What all tests share: one thread, and property tests that draw the same examples every time."""
import signal

import torch
from hypothesis import settings

# A shell starts what runs in the background deaf to Ctrl-C, and the processes that tests interrupt would inherit that
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

torch.set_num_threads(1)
settings.register_profile("ibma", derandomize=True, deadline=None, max_examples=100, database=None)
settings.load_profile("ibma")
