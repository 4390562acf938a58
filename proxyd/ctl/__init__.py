"""Shows what running proxies are doing, for socket-proxyctl. The daemon imports nothing from here.

main         the command line          find        running proxies and their sockets
listing      list, status              client      Varlink, the caller's side
watch        watch                     serve       Varlink, the other side: all metrics in one
top, screen  top                       prometheus  metrics as text
table, text  how it is printed
"""
