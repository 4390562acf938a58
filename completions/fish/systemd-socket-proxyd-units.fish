# Completion of systemd-socket-proxyd-units(1) for fish 3.

# Prints the units of this machine with one of the endings.
function __fish_systemd_socket_proxyd_units_units
    set -l folders (string split -n : -- $SYSTEMD_UNIT_PATH)
    if test -z "$SYSTEMD_UNIT_PATH"; or string match -q '*:' -- $SYSTEMD_UNIT_PATH
        set -l config $HOME/.config
        set -q XDG_CONFIG_HOME; and set config $XDG_CONFIG_HOME
        set -a folders $config/systemd/user /etc/systemd/system /etc/systemd/user \
            /run/systemd/system /usr/local/lib/systemd/system
    end
    for folder in $folders
        for kind in $argv
            for file in $folder/*.$kind
                string replace -r '.*/' '' -- $file
            end
        end
    end
end

function __fish_systemd_socket_proxyd_units_rules
    systemd-socket-proxyd-units check --explain=list 2>/dev/null | string replace -r ' .*' ''
end

set -l units systemd-socket-proxyd-units
set -l commands check create switch
set -l spans 10s 30s 1min 2min 5min 15min 1h
complete -c $units -f
complete -c $units -s h -l help -d 'Show help'
complete -c $units -n __fish_use_subcommand -l version -d 'Show version'
complete -c $units -n __fish_use_subcommand -a check -d 'Tell what goes wrong with units'
complete -c $units -n __fish_use_subcommand -a create -d 'Write units that heal'
complete -c $units -n __fish_use_subcommand -a switch -d 'Turn units of the original into ours'

complete -c $units -n "__fish_seen_subcommand_from $commands" -l user \
    -d 'Units of a user\'s service manager'
complete -c $units -n '__fish_seen_subcommand_from check switch' -l root -x \
    -a '(__fish_complete_directories)' -d 'Units below this folder'
complete -c $units -n '__fish_seen_subcommand_from check switch' -F \
    -a '(__fish_systemd_socket_proxyd_units_units service socket)'
complete -c $units -n '__fish_seen_subcommand_from create switch' -l output -x \
    -a '(__fish_complete_directories)' -d 'Write files into this folder'

complete -c $units -n '__fish_seen_subcommand_from check' -l json -x -a 'pretty short off' \
    -d 'Print findings as JSON'
complete -c $units -n '__fish_seen_subcommand_from check' -l threshold -x -k \
    -a 'note warning error' -d 'Least severity for exit status 1'
complete -c $units -n '__fish_seen_subcommand_from check' -l explain -x \
    -a '(__fish_systemd_socket_proxyd_units_rules)' -d 'Explain a rule'

complete -c $units -n '__fish_seen_subcommand_from create' -l listen -x -d 'Where clients connect'
complete -c $units -n '__fish_seen_subcommand_from create' -l target -x \
    -d 'Where the backend listens'
complete -c $units -n '__fish_seen_subcommand_from create' -l backend -r -F \
    -a '(__fish_systemd_socket_proxyd_units_units service)' -d 'What the proxy starts'
complete -c $units -n '__fish_seen_subcommand_from create' -l name -x -d 'What units are called'
complete -c $units -n '__fish_seen_subcommand_from create' -l on-demand \
    -d 'Stop when nobody uses it'
complete -c $units -n '__fish_seen_subcommand_from create' -l idle -x -k -a "$spans" \
    -d 'How long that takes'
complete -c $units -n '__fish_seen_subcommand_from create' -l start-time -x -k -a "$spans" \
    -d 'Slowest start of the backend'
complete -c $units -n '__fish_seen_subcommand_from create' -l namespace \
    -d 'A private network for proxy and backend'
complete -c $units -n '__fish_seen_subcommand_from create' -l accept \
    -d 'A process for each connection'
complete -c $units -n '__fish_seen_subcommand_from create' -l systemd -x \
    -d 'The oldest systemd for the units'
