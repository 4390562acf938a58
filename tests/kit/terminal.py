"""Real shells in a terminal: tmux types the keys, and its screen shows the result."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

from kit.waiting import wait_until

PREFIX = Path(sys.prefix)
"""Where the command and its completions are installed."""

UNITS = {
    "bash": PREFIX / "share/bash-completion/completions/systemd-socket-proxyd-units",
    "zsh": PREFIX / "share/zsh/site-functions/_systemd-socket-proxyd-units",
    "fish": PREFIX / "share/fish/vendor_completions.d/systemd-socket-proxyd-units.fish",
}
"""The completions of systemd-socket-proxyd-units."""

CTL = {
    "bash": PREFIX / "share/bash-completion/completions/socket-proxyctl",
    "zsh": PREFIX / "share/zsh/site-functions/_socket-proxyctl",
    "fish": PREFIX / "share/fish/vendor_completions.d/socket-proxyctl.fish",
}
"""The completions of socket-proxyctl."""

INSTALLED = {
    "bash": PREFIX / "share/bash-completion/completions/systemd-socket-proxyd",
    "zsh": PREFIX / "share/zsh/site-functions/_systemd-socket-proxyd",
    "fish": PREFIX / "share/fish/vendor_completions.d/systemd-socket-proxyd.fish",
}

BASH_COMPLETION = Path("/usr/share/bash-completion/bash_completion")

PROMPT = ">"
COMMAND = "systemd-socket-proxyd "

INPUTRC = """
set show-all-if-ambiguous on
set completion-query-items 0
set page-completions off
set enable-bracketed-paste off
set bell-style none
"""

BASHRC = f"PS1='{PROMPT} '\n"
ZSHRC = f"""
PROMPT='{PROMPT} '
fpath=({INSTALLED["zsh"].parent} $fpath)
autoload -U compinit && compinit -u -d $HOME/.zcompdump
unsetopt list_ambiguous beep prompt_cr
LISTMAX=10000
"""
FISH_CONFIG = f"""
set -g fish_greeting
set -g fish_autosuggestion_enabled 0
function fish_prompt; printf '{PROMPT} '; end
"""

PRIVATE = 'mount --bind "$0" /etc/hosts && exec "$@"'

START = {
    "bash": "exec bash --noprofile --rcfile $HOME/bashrc -i",
    "bash-completion": "exec bash --noprofile --rcfile $HOME/bashrc-with-package -i",
    "zsh": "exec zsh -o no_global_rcs -i",
    "fish": "exec fish -i",
}
"""The shells, by how they load completions: bash does so with and without bash-completion."""


def program(kind):
    """The shell that `kind` needs."""
    return "bash" if kind == "bash-completion" else kind


def write_settings(home):
    """Write settings for all shells: a short prompt, and an otherwise empty screen."""
    (home / ".inputrc").write_text(INPUTRC)
    sourced = [f". {one['bash']}\n" for one in (INSTALLED, UNITS, CTL)]
    (home / "bashrc").write_text(BASHRC + "".join(sourced))
    # The package finds the completion itself, when it is first asked for.
    (home / "bashrc-with-package").write_text(BASHRC + f". {BASH_COMPLETION}\n")
    (home / ".zshrc").write_text(ZSHRC)
    (home / ".config/fish").mkdir(parents=True)
    (home / ".config/fish/config.fish").write_text(FISH_CONFIG)


class Terminal:
    """A separate tmux with one shell in it. `close()` ends both."""

    def __init__(self, folder, kind, environment, hosts):
        """Start the shell `kind`; `hosts` is what it finds in /etc/hosts."""
        self.kind = kind
        self._tmux = [shutil.which("tmux"), "-S", str(folder / f"tmux-{kind}"), "-f", "/dev/null"]
        variables = [f"{key}={value}" for key, value in environment.items()]
        new = ["new-session", "-d", "-x", "180", "-y", "120", "--", "env", "-i", *variables]
        # A mount namespace, for /etc/hosts.
        private = ["unshare", "--map-root-user", "--mount", "/bin/sh", "-c", PRIVATE, str(hosts)]
        subprocess.run(
            [*private, *self._tmux, *new, "/bin/sh", "-c", START[kind]],
            check=True,
            stdin=subprocess.DEVNULL,
        )
        try:
            self._wait(self._is_empty, f"the prompt of {kind}")
        except BaseException:  # Ctrl-C too: no fixture would close it
            self.close()
            raise

    def close(self):
        """End the shell, and tmux with it."""
        self._call("kill-server")

    def type(self, text):
        """Type `text`."""
        self._call("send-keys", "-l", "--", text)

    def press(self, *keys):
        """Press keys by their names, such as Tab."""
        self._call("send-keys", *keys)

    def lines(self):
        """The screen, without the space at the end of its lines."""
        return self._call("capture-pane", "-p", "-J").stdout.rstrip().split("\n")

    def clear(self):
        """Discard the command line, and clear the screen.

        Not with C-c: the signal may arrive before or after other keys.
        """
        self.press("C-u", "C-l")
        self._wait(self._is_empty, "an empty screen")

    def completed(self, typed, then, line, command=COMMAND):
        """Type `typed` after the command, Tab and `then`; wait for the command line `line`."""
        self.type(command + typed)
        self.press("Tab")
        self.type(then)
        wanted = f"{PROMPT} {command}{line}".rstrip()
        self._wait(lambda: self.lines()[-1] == wanted, f"{wanted!r} after {typed!r} and Tab")

    def offers(self, typed, words, command=COMMAND):
        """Type `typed` after the command and Tab; wait for a list with `words`, and return it."""
        self.type(command + typed)
        self.press("Tab")
        return self._wait(lambda: self._list_with(words), f"{sorted(words)} for {typed!r}")

    def _wait(self, condition, what):
        try:
            return wait_until(condition, what)
        except AssertionError as error:
            screen = "\n".join(self.lines())
            raise AssertionError(f"{error}; {self.kind} shows:\n{screen}") from None

    def _list_with(self, words):
        """The list as text, once it has all `words` and the cursor is at the prompt; else None."""
        lines = self.lines()
        text = "\n".join(line for line in lines if not line.startswith(PROMPT))
        at = int(self._call("display-message", "-p", "#{cursor_y}").stdout)
        listed = at < len(lines) and lines[at].startswith(PROMPT)
        return text if listed and all(is_listed(word, text) for word in words) else None

    def _is_empty(self):
        return self.lines() == [PROMPT]

    def _call(self, *arguments):
        return subprocess.run([*self._tmux, *arguments], check=True, capture_output=True, text=True)


def bracketed(text, kind):
    """`text` as the shell `kind` needs it: except in bash, brackets must be escaped."""
    return text if program(kind) == "bash" else re.sub(r"([][])", r"\\\1", text)


def is_listed(word, text):
    """Whether `word` is in a list, with or without the text typed before it, a final = or :, and
    quoting."""
    bare = re.escape(word.rstrip(":="))
    return re.search(rf"(^|[\s:=/])\\?{bare}(?=[\s:=]|$)", text, re.MULTILINE) is not None
