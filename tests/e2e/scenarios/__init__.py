"""The scenarios, in the order in which they run: importing a module adds its own."""

from scenarios import man_page  # isort: skip  # noqa: F401
from scenarios import transfers  # isort: skip  # noqa: F401
from scenarios import clients  # isort: skip  # noqa: F401
from scenarios import activation  # isort: skip  # noqa: F401
from scenarios import service_manager  # isort: skip  # noqa: F401
from scenarios import limits  # isort: skip  # noqa: F401
from scenarios import on_demand  # isort: skip  # noqa: F401
from scenarios import callers  # isort: skip  # noqa: F401
from scenarios import targets  # isort: skip  # noqa: F401
from scenarios import privilege  # isort: skip  # noqa: F401
from scenarios import examples  # isort: skip  # noqa: F401
from scenarios import user_manager  # isort: skip  # noqa: F401
from scenarios import healing  # isort: skip  # noqa: F401
from scenarios import unit_rules  # isort: skip  # noqa: F401
from scenarios import published_port  # isort: skip  # noqa: F401
from scenarios import unit_reading  # isort: skip  # noqa: F401
