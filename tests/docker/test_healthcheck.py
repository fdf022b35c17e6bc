"""The health check of the images, against pages that are well, ill and gone."""

from __future__ import annotations

import http.server
import os
import runpy
import socket
import subprocess
import sys
import threading
from pathlib import Path

DOCKER = Path(__file__).resolve().parents[2] / "docker"


def health(url: str | None = None, **others: str) -> subprocess.CompletedProcess[str]:
    given = {**os.environ, **others, **({"FLAMINGO_HEALTH_URL": url} if url else {})}
    return subprocess.run(
        [sys.executable, DOCKER / "healthcheck.py"], env=given, capture_output=True, text=True, timeout=30
    )


def test_a_page_that_answers_is_well_and_one_that_does_not_is_ill():
    class Page(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(500 if self.path == "/broken" else 200)
            self.end_headers()

        def log_message(self, *args):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Page) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}"
        assert health(f"{address}/").returncode == 0
        broken = health(f"{address}/broken")
        assert broken.returncode == 1 and "500" in broken.stdout
        # A proxy of the environment would look for the page elsewhere.
        assert health(f"{address}/", http_proxy="http://127.0.0.1:9", no_proxy="").returncode == 0
        server.shutdown()
    gone = health(f"{address}/")
    assert gone.returncode == 1 and "refused" in gone.stdout


def test_what_does_not_speak_http_is_ill():
    with socket.create_server(("127.0.0.1", 0)) as server:

        def answer():
            connection, _ = server.accept()
            with connection:
                connection.recv(1000)
                connection.sendall(b"220 mail\r\n\r\n")

        threading.Thread(target=answer, daemon=True).start()
        ill = health(f"http://127.0.0.1:{server.getsockname()[1]}/")
    assert ill.returncode == 1 and "mail" in ill.stdout and not ill.stderr


def test_the_port_of_the_page_is_read_from_the_demos_own_command(tmp_path):
    healthcheck = runpy.run_path(str(DOCKER / "healthcheck.py"))
    command = tmp_path / "cmdline"
    for words, demo, page in [
        (["python", "/opt/flamingo/bin/flamingo", "demo", "/model", "--port", "9000"], True, "9000"),
        (["/sbin/docker-init", "--", "flamingo", "demo", "/model", "--port=9001"], True, "9001"),
        (["python", "/opt/flamingo/bin/flamingo", "demo", "/model"], True, "7860"),
        (["python", "/opt/flamingo/bin/flamingo", "train", "recipe.yaml"], False, "7860"),
    ]:
        command.write_bytes(b"\0".join(map(str.encode, words)) + b"\0")
        assert healthcheck["is_demo"](command) is demo
        assert healthcheck["port_of"](command) == f"http://127.0.0.1:{page}/"
    assert not healthcheck["is_demo"](tmp_path / "none")


def test_a_container_that_trains_is_well_without_a_page():
    assert health().returncode == 0
