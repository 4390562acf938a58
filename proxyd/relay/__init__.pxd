# The mechanism, in files of inline C functions. They are compiled into proxyd._relay, and nothing
# here is imported at run time.
