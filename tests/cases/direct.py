"""No program at all: a direct connection, whose results every program is compared with."""

from cases.pairs import not_applicable
from kit.stage import Stage


class DirectStage(Stage):
    """Clients connect to the target itself."""

    def forward(
        self, listen, target, *_arguments, listen_buffer=None, target_buffer=None, **_options
    ):
        if listen != target:
            not_applicable("a direct connection has one family")
        backend = self.backend(target, receive_buffer=target_buffer)
        self._front = backend.listener
        return backend

    def connect(self, listener=None, **options):
        return super().connect(listener or self._front, **options)

    def launch(self, *_arguments, **_options):
        not_applicable("there is no program")
