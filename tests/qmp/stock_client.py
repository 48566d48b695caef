"""Drives a control socket with the stock QMP client, as a stranger would.

Usage: stock_client.py SOCKET OVERLAY_FOLDER NODE...

Every NODE is snapshotted, all of them in one transaction, with overlays that the daemon makes and with others that were made before; the first one
by itself as well; then all by our own command, if the daemon has that. At last the daemon is told to quit. Each step prints what it saw; the first
thing that is not as QMP says ends the program with status 1.
"""

import asyncio
import subprocess
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


def overlay(path, backing, size):
    # Without a look at the backing file, which is locked.
    subprocess.run(["qemu-img", "create", "-q", "-u", "-f", "qcow2", "-F", "qcow2", "-b", backing, path, str(size)], check=True)


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
    tops = {node: f"{node}-stock" for node in nodes}

    first = nodes[0]
    alone = {
        "node-name": tops[first],
        "snapshot-node-name": f"{first}-alone",
        "snapshot-file": str(folder / f"{first}.alone.qcow2"),
        "format": "qcow2",
    }
    await client.execute("blockdev-snapshot-sync", alone)
    tops[first] = alone["snapshot-node-name"]
    after = await files(client)
    expect(after[tops[first]].endswith(f"{first}.alone.qcow2"), f"{first} has an overlay of its own")

    sizes = {node["node-name"]: node["image"]["virtual-size"] for node in await client.execute("query-named-block-nodes")}
    for node in nodes:
        path = folder / f"{node}.made.qcow2"
        overlay(path, Path(after[tops[node]]).name, sizes[tops[node]])
        file = {"driver": "file", "filename": str(path)}
        await client.execute("blockdev-add", {"driver": "qcow2", "node-name": f"{node}-made", "file": file, "backing": None})
    actions = [{"type": "blockdev-snapshot", "data": {"node": tops[node], "overlay": f"{node}-made"}} for node in nodes]
    await client.execute("transaction", {"actions": actions})
    after = await files(client)
    for node in nodes:
        # QEMU names it in JSON.
        expect(f"{node}.made.qcow2" in after.get(f"{node}-made", ""), f"{node} has the overlay that was made for it")
    expect(await client.execute("query-jobs") is not None, "query-jobs answers")

    if "snapshot-create" in commands:
        members = [{"device": node, "overlay": str(folder / f"{node}.named.qcow2")} for node in nodes]
        with client.listener(("SNAPSHOT_SWITCHED", "SNAPSHOT_FROZEN")) as listener:
            switched = await client.execute("snapshot-create", {"name": "named", "devices": members, "create": True})
            expect(switched["state"] in ("switched", "frozen"), "snapshot-create answers when the disks have switched")
            told = [await listener.get() for _ in range(2)]
        expect([event["event"] for event in told] == ["SNAPSHOT_SWITCHED", "SNAPSHOT_FROZEN"], "both events come, in this order")
        expect(all(event["data"]["name"] == "named" for event in told), "they name the snapshot")
        expect(told[1]["data"]["state"] == "frozen", "it is frozen")

    await client.execute("quit")
    try:
        await client.disconnect()
    except EOFError:
        pass  # It was quicker.


asyncio.run(asyncio.wait_for(main(sys.argv[1], Path(sys.argv[2]), sys.argv[3:]), timeout=60))
