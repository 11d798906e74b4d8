"""The first import of train.py and sample.py: Ctrl-C before `main` begins ends them silently."""

import signal
import sys

if (getattr(sys.modules["__main__"], "__file__", None) or "").endswith(("train.py", "sample.py")):
    if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
