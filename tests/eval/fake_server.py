"""A server over loopback that speaks the protocol of completions by token ids and holds no model: it adds one to the last prompt id."""

import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@contextmanager
def fake_server(*, statuses=(), tokens=True, models=("m",)):
    """Yields (url, requests seen). statuses: what the first answers fail with. tokens: whether token ids are returned."""
    seen, failing, lock = [], list(statuses), threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.reply(200, {"data": [{"id": name, "max_model_len": 64} for name in models]} if models else {"data": []})

        def do_POST(self):
            content = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with lock:
                seen.append(content)
                status = failing.pop(0) if failing else 200
            if status != 200:
                return self.reply(status, {"error": "no"})
            choice = {"finish_reason": "stop", "text": "x"} | ({"token_ids": [content["prompt"][-1] + 1, 4]} if tokens else {})
            return self.reply(200, {"choices": [choice]})

        def reply(self, status, content):
            body = json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1", seen
    finally:
        server.shutdown()
        thread.join(10)
        server.server_close()
