"""The scenarios, in the order in which they run: importing a module adds its own."""

from e2e.scenarios import man_page  # isort: skip  # noqa: F401
from e2e.scenarios import transfers  # isort: skip  # noqa: F401
from e2e.scenarios import clients  # isort: skip  # noqa: F401
from e2e.scenarios import activation  # isort: skip  # noqa: F401
from e2e.scenarios import service_manager  # isort: skip  # noqa: F401
from e2e.scenarios import continuity  # isort: skip  # noqa: F401
from e2e.scenarios import store  # isort: skip  # noqa: F401
from e2e.scenarios import kills  # isort: skip  # noqa: F401
from e2e.scenarios import limits  # isort: skip  # noqa: F401
from e2e.scenarios import on_demand  # isort: skip  # noqa: F401
from e2e.scenarios import datagrams  # isort: skip  # noqa: F401
from e2e.scenarios import callers  # isort: skip  # noqa: F401
from e2e.scenarios import targets  # isort: skip  # noqa: F401
from e2e.scenarios import privilege  # isort: skip  # noqa: F401
from e2e.scenarios import examples  # isort: skip  # noqa: F401
from e2e.scenarios import inspection  # isort: skip  # noqa: F401
from e2e.scenarios import user_manager  # isort: skip  # noqa: F401
from e2e.scenarios import healing  # isort: skip  # noqa: F401
from e2e.scenarios import healing_alone  # isort: skip  # noqa: F401
from e2e.scenarios import healing_podman  # isort: skip  # noqa: F401
from e2e.scenarios import unit_rules  # isort: skip  # noqa: F401
from e2e.scenarios import datagrams_podman  # isort: skip  # noqa: F401
from e2e.scenarios import published_port  # isort: skip  # noqa: F401
from e2e.scenarios import unit_reading  # isort: skip  # noqa: F401
