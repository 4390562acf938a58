"""A real terminal: tmux, with a shell in it."""

import shlex
import shutil
import subprocess

from kit.waiting import wait_until


class Tmux:
    """A terminal of a given size. `close()` ends it."""

    def __init__(self, folder, environment, columns=80, rows=24):
        self._tmux = [shutil.which("tmux"), "-S", str(folder / "tmux"), "-f", "/dev/null"]
        variables = [f"{key}={value}" for key, value in environment.items()]
        self._run(
            *("new-session", "-d", "-x", str(columns), "-y", str(rows), "--"),
            *("env", "-i", *variables, "PS1=$ ", "/bin/sh"),
        )
        self.wait_for(lambda: self.lines()[-1] == "$", "the prompt")

    def close(self):
        """End the shell, and tmux with it."""
        self._run("kill-server")

    def start(self, *words):
        """Type a command line and Enter."""
        self._run("send-keys", "-l", "--", shlex.join(map(str, words)))
        self.press("Enter")

    def press(self, *keys):
        """Press keys by their names."""
        self._run("send-keys", *keys)

    def resize(self, columns, rows):
        """Change the size of the terminal."""
        self._run("resize-window", "-x", str(columns), "-y", str(rows))

    def lines(self):
        """The screen, without the space at the end of its lines."""
        return self._run("capture-pane", "-p").rstrip().split("\n")

    def modes(self):
        """Whether the alternate screen is shown, the cursor is visible, and long lines wrap."""
        return self._run("display", "-p", "#{alternate_on} #{cursor_flag} #{wrap_flag}").strip()

    def wait_for(self, condition, what):
        """Wait until `condition()` is true; the screen is in the message if it never is."""
        try:
            return wait_until(condition, what)
        except AssertionError as error:
            raise AssertionError(f"{error}\n" + "\n".join(self.lines())) from None

    def shows(self, text):
        """Wait until `text` is on the screen."""
        self.wait_for(lambda: text in "\n".join(self.lines()), f"{text!r} on the screen")

    def _run(self, *words):
        return subprocess.run(
            [*self._tmux, *words],
            check=True,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
        ).stdout
