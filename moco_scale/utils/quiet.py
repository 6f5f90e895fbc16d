"""For programs, before their other imports: until they listen, Ctrl-C ends them silently."""

import signal

if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)
