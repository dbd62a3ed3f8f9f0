"""One lock for all that touches exported programs in threads.

torch.export keeps state in globals: saving a program patches how fake tensors are pickled, and whoever copies or
rewrites a program meanwhile, or saves another, fails now and then. Imports no torch.
"""

import threading

EXPORT_LOCK = threading.RLock()
"""Held while a program is captured, rewritten or saved."""
