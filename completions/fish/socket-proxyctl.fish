# Completion of socket-proxyctl(1) for fish 3.

# Prints the running services, of the user's manager if the command line says so.
function __fish_socket_proxyctl_units
    set -l user
    contains -- --user (commandline -opc); and set user --user
    systemctl $user list-units --type=service --state=running --plain --no-legend --full \
        2>/dev/null | string replace -r '^\s*(\S+).*' '$1'
end

set -l ctl socket-proxyctl
set -l commands list top watch metrics status terminate
complete -c $ctl -f
complete -c $ctl -s h -l help -d 'Show help'
complete -c $ctl -n __fish_use_subcommand -l version -d 'Show version'
complete -c $ctl -n __fish_use_subcommand -a list -d 'List connections'
complete -c $ctl -n __fish_use_subcommand -a top -d 'Show connections as they change'
complete -c $ctl -n __fish_use_subcommand -a watch -d 'Print connections that begin and end'
complete -c $ctl -n __fish_use_subcommand -a metrics -d 'Print metrics'
complete -c $ctl -n __fish_use_subcommand -a status -d 'Show listeners, targets and limits'
complete -c $ctl -n __fish_use_subcommand -a terminate -d 'End connections'

complete -c $ctl -n "__fish_seen_subcommand_from $commands" -l unit -x \
    -a '(__fish_socket_proxyctl_units)' -d 'This service only'
complete -c $ctl -n "__fish_seen_subcommand_from $commands" -l socket -r -F \
    -d 'The proxy with this inspection socket'
complete -c $ctl -n "__fish_seen_subcommand_from $commands" -l user \
    -d 'Services of the user\'s manager'
complete -c $ctl -n '__fish_seen_subcommand_from list' -l target -x \
    -d 'Only connections to this target'
complete -c $ctl -n '__fish_seen_subcommand_from list' -l state -x \
    -a 'header held connecting open lingering flow' -d 'Only connections in this state'
complete -c $ctl -n '__fish_seen_subcommand_from list status' -l full -d 'Cut nothing'
complete -c $ctl -n '__fish_seen_subcommand_from top' -l interval -x -k -a '500ms 1s 2s 5s' \
    -d 'Time between two looks'
complete -c $ctl -n '__fish_seen_subcommand_from list watch metrics status terminate' -l json -x \
    -a 'pretty short off' -d 'Print JSON'
