"""A coordinator's SuperLink as a child process. What runs in that process is ``superlink.py``."""

from __future__ import annotations

import os
import secrets
import subprocess
import sys
import threading
from dataclasses import dataclass
from pathlib import Path

from perfedrec.runtimes.flower.rates import VARIABLE, Rates, Refused


@dataclass(frozen=True)
class Certificates:
    """Files of a server: the certificate of the authority, the server's own certificate, and the key to the latter."""

    ca: Path
    certificate: Path
    key: Path


class SuperLink:
    """A SuperLink as a child process of this one.

    It ends with this process, and keeps in ``folder`` which nodes are registered and which runs are open. When it dies
    it is started again; ``restarts`` counts how often that happened. What it prints is in the file ``log``. ``rates``
    are what each key may do in a minute; without them nothing is counted. ``refused`` tells whose were refused.
    """

    def __init__(
        self, folder: Path, host: str, port: int, certificates: Certificates, rates: Rates | None = None
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        folder.chmod(0o700)
        self.secret = secrets.token_bytes(32)
        self._secret_file = folder / "superexec.secret"
        self._secret_file.touch(mode=0o600)
        self._secret_file.write_bytes(self.secret)
        self.log = folder / "superlink.log"
        self._command = [
            *(sys.executable, "-P", str(Path(__file__).with_name("superlink.py"))),
            *("--isolation", "process", "--superexec-auth-secret-file", str(self._secret_file)),
            *("--ssl-ca-certfile", str(certificates.ca)),
            *("--ssl-certfile", str(certificates.certificate), "--ssl-keyfile", str(certificates.key)),
            *("--enable-supernode-auth", "--disable-runtime-dependency-installation"),
            *("--host", host, "--port", str(port), "--database", str(folder / "superlink.json")),
        ]
        self._environment = os.environ | ({} if rates is None else {VARIABLE: rates.dump()})
        self.refused = Refused(folder)
        self._stop, self.restarts = threading.Event(), 0
        self.process = self._start()
        self._watching = threading.Thread(target=self._watch, daemon=True)
        self._watching.start()

    def _start(self) -> subprocess.Popen[bytes]:
        with open(self.log, "ab") as log:
            return subprocess.Popen(
                self._command,
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                start_new_session=True,
                env=self._environment,
            )

    def _watch(self) -> None:
        while not self._stop.wait(0.5):
            if self.process.poll() is not None:
                self.process, self.restarts = self._start(), self.restarts + 1
                self._stop.wait(2.0)

    def stop(self) -> None:
        """End the process."""
        self._stop.set()
        self._watching.join()  # the thread may be starting the process again at this moment
        self.process.terminate()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
