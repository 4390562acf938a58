# The mechanism. Every .pxd holds inline C functions, which are compiled into the extension
# proxyd._relay, together with two .pxi, which hold what Python sees of them: events.pxi the classes
# of values, calls.pxi the functions. flows.pxd and its files, for datagrams, are compiled into
# proxyd._datagram. Nothing in this folder is imported, or installed.
#
# Why not C, and why not more extensions: in Cython the functions read as the Python around them
# does, with its checker and its linter; one extension means one dlopen(3) before the first client
# of a stream is served; and the compiler sees everything at once, so that a call between files
# costs nothing. What remains is an idea per file.
#
# Read downwards. A function stands above those that it calls, and a file above those that it
# cimports (tests/unit/test_reading_order.py has the order of the files). A connection comes by
#
#   loop ──▶ accept ──▶ connect ──▶ connection ──▶ pump ──▶ close
#
# and the loop again for each batch of events. Below these are what they use: balance and quarantine
# (which thread), half, endpoint, pipe (what is held, and where), mailbox, gauges, busy (threads and
# their load), self_connect and rights (clients to beware of), sweep, row and upstream (what is told
# of connections), enter, pages, tidy, keep, slate and strike (what outlives a kill, for recover);
# types and records have every structure, sys every system call. workers, at the top, runs the loop
# in further threads. Datagrams have a walk of their own, described in flows.pxd:
#
#   flows ──▶ flow_listener ──▶ flow_send ──▶ flow_target
#         └─▶ flow_replies
