#!/usr/bin/python3
"""A generator that stands in for Podman's Quadlet: it makes a service of each NAME.container.

Usage: quadlet.py FOLDER, as systemd.generator(7) has it
"""

import sys
from pathlib import Path

SERVICE = """
[Service]
KillMode=mixed
Type=notify
NotifyAccess=all
ExecStart=/usr/bin/podman run --name=systemd-%N --replace --rm --sdnotify=conmon {publish} {image}
ExecStop=/usr/bin/podman rm -v -f -i systemd-%N
"""


def main() -> None:
    for path in sorted(Path("/etc/containers/systemd").glob("*.container")):
        lines = path.read_text(encoding="utf-8").splitlines()
        values = [line.partition("=") for line in lines]
        publish = " ".join(f"--publish={v}" for key, _, v in values if key == "PublishPort")
        image = next(v for key, _, v in values if key == "Image")
        service = Path(sys.argv[1]) / f"{path.stem}.service"
        text = "\n".join(lines).replace("[Container]", "[X-Container]")
        service.write_text(text + SERVICE.format(publish=publish, image=image), encoding="utf-8")


main()
