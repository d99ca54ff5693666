"""Lets CPU threads that have nothing to do sleep. Commands that generate import it before torch.

A token is hundreds of short sections that threads share. Between them a thread spins by default, if the
machine does other work as well on the core of the one it waits for, which then waits for the spinning one.
OpenMP reads this once, when torch is loaded; what the user has set stays.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
