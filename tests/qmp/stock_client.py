"""Drives a control socket with the stock QMP client, as a stranger would.

Usage: stock_client.py SOCKET OVERLAY_FOLDER NODE...

Every NODE is snapshotted, all of them in one transaction. Each step prints what it saw; the first thing that is not as QMP says ends the program
with status 1.
"""

import asyncio
import sys
from pathlib import Path

from qemu.qmp import ExecuteError, QMPClient


def expect(condition, what):
    if not condition:
        sys.exit(f"not as expected: {what}")
    print(f"ok: {what}")


async def refused(client, error_class, command, arguments=None):
    try:
        await client.execute(command, arguments)
    except ExecuteError as error:
        found = error.error_class
        expect(found == error_class, f"{command} {arguments or ''} is refused with {error_class} (was {found}: {error})")
    else:
        sys.exit(f"not as expected: {command} {arguments} was accepted")


async def files(client):
    return {node["node-name"]: node["file"] for node in await client.execute("query-named-block-nodes")}


async def main(socket, folder, nodes):
    client = QMPClient("stock")
    await client.connect(socket)
    version = await client.execute("query-version")
    expect(isinstance(version["qemu"]["major"], int), f"query-version gives {version}")
    commands = {command["name"] for command in await client.execute("query-commands")}
    used = {"query-version", "query-commands", "query-named-block-nodes", "transaction", "blockdev-snapshot-sync", "query-jobs", "quit"}
    expect(used <= commands, f"query-commands lists {len(commands)} commands, those used here among them")

    before = await files(client)
    expect(set(nodes) <= set(before), "query-named-block-nodes lists the devices")
    await refused(client, "CommandNotFound", "no-such-command")
    await refused(client, "GenericError", "query-version", {"no-such-argument": 1})
    await refused(client, "GenericError", "blockdev-snapshot-sync", {"node-name": 7, "snapshot-file": "x"})
    await refused(client, "GenericError", "blockdev-snapshot-sync", {"node-name": nodes[0]})
    expect(await files(client) == before, "nothing has changed after refused commands")

    actions = [
        {
            "type": "blockdev-snapshot-sync",
            "data": {
                "node-name": node,
                "snapshot-node-name": f"{node}-stock",
                "snapshot-file": str(folder / f"{node}.stock.qcow2"),
                "format": "qcow2",
            },
        }
        for node in nodes
    ]
    await client.execute("transaction", {"actions": actions})
    after = await files(client)
    for node in nodes:
        expect(after.get(f"{node}-stock", "").endswith(f"{node}.stock.qcow2"), f"{node} has its overlay")
    expect(await client.execute("query-jobs") is not None, "query-jobs answers")
    await client.disconnect()


asyncio.run(asyncio.wait_for(main(sys.argv[1], Path(sys.argv[2]), sys.argv[3:]), timeout=60))
