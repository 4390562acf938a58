# Completion of systemd-socket-proxyd(1) for fish 3.

# Prints the hosts that /etc/hosts and ssh know, IPv6 addresses in brackets.
function __fish_systemd_socket_proxyd_hosts
    set -l files
    for file in /etc/hosts ~/.ssh/known_hosts /etc/ssh/ssh_known_hosts
        test -r $file
        and set -a files $file
    end
    test -n "$files"
    and command awk '
        function show(host) {
            if (host ~ /:/) host = "[" host "]"
            if (host ~ /^[][A-Za-z0-9_.:-]+$/) print host ":"
        }
        FILENAME == "/etc/hosts" { # 0.0.0.0 blocks names, ff.. and fe00 are groups
            sub(/#.*/, "")
            if ($1 !~ /^(0\.0\.0\.0$|255\.|fe00:|ff0)/) for (i = 1; i <= NF; i++) show($i)
            next
        }
        /^[^@|#]/ { # without a marker, and not hashed
            count = split($1, names, ",")
            for (i = 1; i <= count; i++) {
                sub(/^\[/, "", names[i])
                sub(/\](:[0-9]+)?$/, "", names[i])
                show(names[i])
            }
        }' $files 2>/dev/null
end

# Prints the names of the ports of the protocol $argv[1].
function __fish_systemd_socket_proxyd_services
    command awk -v protocol="/$argv[1]\$" '
        { sub(/#.*/, "") }
        $2 ~ protocol { print $1; for (i = 3; i <= NF; i++) print $i }' /etc/services 2>/dev/null
end

# Prints the abstract UNIX sockets that are listening or, with an argument, those for datagrams.
function __fish_systemd_socket_proxyd_abstract
    command awk -v datagram="$argv[1]" '
        (datagram ? $5 == "0002" : $4 == "00010000" && $5 == "0001") &&
            $8 ~ /^@[A-Za-z0-9_.\/:=@+-]+$/ { print $8 }
    ' /proc/net/unix 2>/dev/null
end

# Prints the folders of units that systemd.unit(5) lists, those of users and of the system.
function __fish_systemd_socket_proxyd_unit_path
    set -l config ~/.config
    set -q XDG_CONFIG_HOME
    and set config $XDG_CONFIG_HOME
    # A variable called ...PATH is a list in fish, which the quotes join again.
    set -l path "$SYSTEMD_UNIT_PATH"
    string match -q -r '[^:]$' -- $path
    or set path $path$config/systemd/user:/etc/systemd/system:/etc/systemd/user:/run/systemd/system:/usr/local/lib/systemd/system:/usr/lib/systemd/system:/lib/systemd/system:/usr/lib/systemd/user
    string split -n : -- $path
end

# Prints the names of the listeners of socket units: FileDescriptorName=, or the name of the unit.
# The first file of a unit counts, and drop-ins before it.
function __fish_systemd_socket_proxyd_listeners
    set -l drop_ins
    set -l units
    for folder in (__fish_systemd_socket_proxyd_unit_path)
        set -a drop_ins $folder/*.socket.d/*.conf
        set -a units $folder/*.socket
    end
    set -l files
    for file in $drop_ins $units
        test -f $file -a -r $file
        and set -a files $file
    end
    test -n "$files"
    and command awk '
        FNR == 1 {
            unit = FILENAME
            drop_in = sub(/\.d\/[^\/]*$/, "", unit)
            sub(/.*\//, "", unit)
            hidden = !drop_in && (unit in there)
            if (!drop_in) there[unit]
        }
        hidden { next }
        /^Listen(Stream|Datagram)=./ { listens[unit] }
        /^FileDescriptorName=./ && !(unit in name) { name[unit] = substr($0, 20) }
        END {
            for (unit in listens) {
                called = (unit in name) ? name[unit] : unit
                if ((unit in there) && called !~ /^[\/@[]|[:=%]|@\.socket$/) print called "="
            }
        }' $files 2>/dev/null
end

# Prints the directories and sockets that begin with $argv[1].
function __fish_systemd_socket_proxyd_paths
    for file in $argv[1]*
        if test -d $file
            echo $file/
        else if test -S $file
            echo $file
        end
    end
end

# Prints its input, with $argv[1] before each line.
function __fish_systemd_socket_proxyd_behind
    while read -l line
        printf '%s%s\n' $argv[1] $line
    end
end

# Prints completions of the address $argv[1]: a TARGET, or with a second argument what --listen=
# takes.
function __fish_systemd_socket_proxyd_addresses
    set -l target "$argv[1]"
    switch $target
        case '/*'
            __fish_systemd_socket_proxyd_paths $target
        case 'unix:/*'
            __fish_systemd_socket_proxyd_paths (string sub -s 6 -- $target) |
                __fish_systemd_socket_proxyd_behind unix:
        case 'unix:*'
            begin
                echo /
                __fish_systemd_socket_proxyd_abstract
            end | __fish_systemd_socket_proxyd_behind unix:
        case 'unix-dgram:/*'
            __fish_systemd_socket_proxyd_paths (string sub -s 12 -- $target) |
                __fish_systemd_socket_proxyd_behind unix-dgram:
        case 'unix-dgram:*'
            begin
                echo /
                __fish_systemd_socket_proxyd_abstract datagram
            end | __fish_systemd_socket_proxyd_behind unix-dgram:
        case 'udp:*'
            set -l rest (string sub -s 5 -- $target)
            __fish_systemd_socket_proxyd_inet "$rest" udp $argv[2..] |
                __fish_systemd_socket_proxyd_behind udp:
        case '@*'
            __fish_systemd_socket_proxyd_abstract
        case 'vsock:*:*'
            # a number, whatever the other side has chosen
        case 'vsock:*'
            printf 'vsock:%s:\n' 1 2
        case '*'
            string match -q -r '^(\[.*\]|[^[].*|):' -- $target
            or printf '%s\n' / @ unix: vsock: udp: unix-dgram:
            __fish_systemd_socket_proxyd_inet "$target" tcp $argv[2..]
    end
end

# Prints completions of HOST:PORT in $argv[1], for the protocol $argv[2]; with a third argument, of
# what --listen= takes.
function __fish_systemd_socket_proxyd_inet
    if string match -q -r '^(\[.*\]|[^[].*|):' -- $argv[1]
        set -q argv[3]
        or begin
            echo '*'
            __fish_systemd_socket_proxyd_services $argv[2]
        end | __fish_systemd_socket_proxyd_behind (string replace -r '[^:]*$' '' -- $argv[1])
        return
    end
    printf '%s\n' '127.0.0.1:' '[::1]:'
    if set -q argv[3]
        printf '%s\n' '0.0.0.0:' '[::]:'
    else
        __fish_systemd_socket_proxyd_hosts
    end
end

# The word up to the cursor, without its quoting, and without the option that it may begin with.
function __fish_systemd_socket_proxyd_word
    set -l token (commandline -ct)
    set -l word (string unescape -- $token)
    or set word $token
    string replace -r '^--[a-z-]+=' '' -- "$word"
end

# NAME= at the beginning of a word, distinguished from a TARGET as the program does.
function __fish_systemd_socket_proxyd_pair
    string match -r '^[^[/@:=][^:=]*=' -- "$argv[1]"
end

# Prints completions of the address in a word that may begin with NAME=.
function __fish_systemd_socket_proxyd_named_addresses
    set -l name (__fish_systemd_socket_proxyd_pair $argv[1])
    set -l target (string sub -s (math (string length -- "$name") + 1) -- "$argv[1]")
    __fish_systemd_socket_proxyd_addresses "$target" $argv[2..] |
        __fish_systemd_socket_proxyd_behind "$name"
end

# Prints the operands before the cursor, and "listen NAME=" for the names that --listen= has given.
function __fish_systemd_socket_proxyd_said
    set -l with_value -c --connections-max --connections-max-per-source --exit-idle-time \
        --proxy-protocol --accept-proxy-protocol --source --connect-timeout --settle-time --idle-timeout --drain-timeout --crash-recovery --listen --threads --hand-over --buffer-size \
        --inspect --log-addresses
    set -l option
    set -l ended
    for word in (commandline -opc)[2..]
        if test -n "$option"
            test $option = --listen
            and printf 'listen %s\n' (__fish_systemd_socket_proxyd_pair $word)
            set option
        else if test -n "$ended"; or not string match -q -- '-?*' $word
            printf 'operand %s\n' $word
        else if test $word = --
            set ended yes
        else if string match -q -- '--listen=*' $word
            printf 'listen %s\n' (__fish_systemd_socket_proxyd_pair (string sub -s 10 -- $word))
        else if string match -q -- "$word*" $with_value
            set option $word # abbreviated or not
        end
    end
end

# A plain TARGET is the only operand, and a listener has one target.
function __fish_systemd_socket_proxyd_operands
    set -l word (__fish_systemd_socket_proxyd_word)
    set -l said (__fish_systemd_socket_proxyd_said)
    set -l operands (string replace -f -r '^operand ' '' -- $said)
    if __fish_systemd_socket_proxyd_pair "$word" >/dev/null
        __fish_systemd_socket_proxyd_named_addresses "$word"
        return
    end
    if set -q operands[1]
        __fish_systemd_socket_proxyd_pair $operands[1] >/dev/null
        or return
    else
        __fish_systemd_socket_proxyd_addresses "$word"
    end
    set -l taken (string match -r '^[^=]*=' -- $operands)
    for name in (string replace -f -r '^listen ' '' -- $said) (__fish_systemd_socket_proxyd_listeners)
        test -n "$name"
        and not contains -- $name $taken
        and echo $name
    end
end

function __fish_systemd_socket_proxyd_listen
    __fish_systemd_socket_proxyd_named_addresses (__fish_systemd_socket_proxyd_word) listen
end

# Prints `client`, and the network interfaces.
function __fish_systemd_socket_proxyd_sources
    echo client
    for file in /sys/class/net/*/ifindex
        string replace -r '.*/([^/]+)/ifindex$' '$1' -- $file
    end
end

set -l spans 0 10s 30s 1min 5min 15min 1h infinity
complete -c systemd-socket-proxyd -f -a '(__fish_systemd_socket_proxyd_operands)'
complete -c systemd-socket-proxyd -s c -l connections-max -x -k -a '64 256 1024 4096' \
    -d 'Maximum number of connections'
complete -c systemd-socket-proxyd -l connections-max-per-source -x -k -a '8 16 32 64' \
    -d 'Maximum number of connections of one client'
complete -c systemd-socket-proxyd -l exit-idle-time -x -k -a "$spans" \
    -d 'Exit when without a connection for this long'
complete -c systemd-socket-proxyd -l proxy-protocol -x -a 'v1 v2' -d 'Send the address of the client to the target'
complete -c systemd-socket-proxyd -l accept-proxy-protocol -x -k \
    -a 'unix 10.0.0.0/8 172.16.0.0/12 192.168.0.0/16 fd00::/8' \
    -d 'Expect a PROXY header from these networks'
complete -c systemd-socket-proxyd -l source -x -k -a '(__fish_systemd_socket_proxyd_sources)' \
    -d 'Connect to targets from here'
complete -c systemd-socket-proxyd -l connect-timeout -x -k -a "$spans" \
    -d 'Hold clients this long while the target cannot be reached'
complete -c systemd-socket-proxyd -l settle-time -x -k -a '0 50ms 100ms 500ms 1s' \
    -d 'Watch an unproven target for this long before anything is sent'
complete -c systemd-socket-proxyd -l idle-timeout -x -k -a "$spans[2..]" \
    -d 'Close a connection over which nothing has moved for this long'
complete -c systemd-socket-proxyd -l drain-timeout -x -k -a "$spans" \
    -d 'Let open connections finish this long on SIGTERM'
complete -c systemd-socket-proxyd -l crash-recovery -x -k -a 'tcp all no' \
    -d 'Connections that outlive a crash'
complete -c systemd-socket-proxyd -l listen -x -a '(__fish_systemd_socket_proxyd_listen)' \
    -d 'Listen here as well'
complete -c systemd-socket-proxyd -l threads -x -k -a 'auto 1 2 4' -d 'Number of relay threads'
complete -c systemd-socket-proxyd -l hand-over -x -k -a 'busy always' \
    -d 'When other threads get connections'
complete -c systemd-socket-proxyd -l buffer-size -x -k -a 'auto 64K 256K 1M' \
    -d 'Bytes to hold per direction'
complete -c systemd-socket-proxyd -l inspect -x -k -a '/run/ fd: no' -d 'Inspection socket'
complete -c systemd-socket-proxyd -l log-addresses -x -k -a 'yes no' \
    -d 'Whether the log may contain addresses of clients'
complete -c systemd-socket-proxyd -s h -l help -d 'Show help'
complete -c systemd-socket-proxyd -l version -d 'Show version'
