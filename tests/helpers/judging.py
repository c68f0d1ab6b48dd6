"""A process that judges gates and delivers verdicts until it is killed. Run as a module."""

from __future__ import annotations

import sys
import threading
from pathlib import Path

from service.gate_deliveries import Deliveries
from service.gate_judge import GateJudge
from service.http.services import open_services
from service.jobs.deliveries import OwedDelivery
from service.jobs.gates import GateStore
from tests.helpers.databases import settings_for

KIND = "note"


def main() -> None:
    """Arguments: folder, URL or `-`, seconds for which a gate that was taken is left alone, file that deliveries are noted in."""
    folder, url, seconds, notes = sys.argv[1:]
    services = open_services(settings_for(Path(folder), None if url == "-" else url))
    gates = GateStore(services.engine, services.jobs, float(seconds))

    def note(owed: OwedDelivery) -> bool:
        with Path(notes).open("a") as file:
            file.write(f"{owed.delivery.gate_id} {gates.record(owed.delivery.gate_id).verdict}\n")
        return True

    stop = threading.Event()
    threading.Thread(target=Deliveries(services.deliveries, KIND, note).run, args=(stop,), daemon=True).start()
    GateJudge(gates, services.jobs, services.stores, services.settings).run(stop)


if __name__ == "__main__":
    main()
