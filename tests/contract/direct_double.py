"""A small cluster whose replicas listen themselves, with tickets, in this process. The gateway is a ``FakeWorker``."""

import json
import secrets
import sys
import threading
import time
from collections import Counter

import grpc
from fake_worker import FakeWorker, _Inference
from trunkline_wire.specs import Endpoint, Endpoints
from trunkline_wire.tickets import PROOF_METADATA, TICKET_METADATA, read_proof
from trunkline_wire.v1 import inference_pb2_grpc


class FakeReplica(FakeWorker):
    """A replica with a server of its own. Lets in whoever shows a ticket of its cluster and a proof never seen before.

    ``refusals`` counts why callers were turned away, ``seen`` lists the proofs accepted, ``batches`` counts answers to
    batches of streams. With ``refuses_all`` nobody gets in. ``hook`` is called with the number of each batch before it
    is answered.
    """

    def __init__(self, cluster, name, *, tls=None):
        super().__init__(tls=tls)
        self.cluster, self.name = cluster, name
        self.rows, self.kept = cluster.rows, cluster.kept
        self.seen, self.refusals, self.batches = [], Counter(), 0
        self.hook, self.refuses_all = (lambda number: None), False
        self.interceptors = (_Gate(self),)

    def add_services(self, server):
        """Add what a replica answers."""
        inference_pb2_grpc.add_InferenceServiceServicer_to_server(_Inference(self), server)

    def tenant_of(self, metadata):
        """Return whose call this is: the gate has seen to it."""
        return "default"

    def before_batch(self, number):
        """Call the hook, and count."""
        self.hook(number)
        self.batches += 1

    @property
    def endpoint(self):
        """Return what the gateway says of it."""
        return Endpoint(self.address, self.name)

    def stop(self, grace_s=0.0):
        """End the server. Returns an event that is set once it has ended."""
        return self._server.stop(grace_s)


class _Gate(grpc.ServerInterceptor):
    def __init__(self, replica):
        self._replica = replica

    def intercept_service(self, continuation, details):
        handler = continuation(details)
        # Health is everyone's to ask.
        why = "" if handler is None or "/grpc.health." in details.method else self._refusal(details)
        if not why:
            return handler
        self._replica.refusals[why] += 1

        def refuse(request, context):
            context.abort(grpc.StatusCode.UNAUTHENTICATED, f"[UNAUTHENTICATED] {why} (request none)")

        if handler.request_streaming:
            return grpc.stream_stream_rpc_method_handler(refuse, handler.request_deserializer)
        return grpc.unary_unary_rpc_method_handler(refuse, handler.request_deserializer)

    def _refusal(self, details):
        replica, metadata = self._replica, dict(details.invocation_metadata)
        if "authorization" in metadata:
            return "a token was shown"
        ticket = metadata.get(TICKET_METADATA)
        known = replica.cluster.tickets.get(ticket)
        if known is None:
            return "unknown ticket"
        key, end_s = known
        if time.monotonic() > end_s or replica.refuses_all:
            return "expired"
        number = read_proof(key, ticket, replica.name, details.method, metadata.get(PROOF_METADATA, b""))
        if number is None:
            return "forged"
        with replica.lock:
            if (ticket, number) in {(one, other) for one, other, _ in replica.seen}:
                return "replayed"
            replica.seen.append((ticket, number, details.method))
        return ""


class FakeCluster(FakeWorker):
    """A gateway that knows of replicas. ``listed`` is what it says of them, ``valid_s`` how long tickets are good."""

    def __init__(self, *, tls=None):
        super().__init__(tls=tls)
        self.tickets, self.listed, self.replicas = {}, [], []
        self.valid_s, self.replicas_tls, self.tls_name = 60.0, tls is not None, ""
        self.asked = threading.Semaphore(0)

    def replica(self, name=None, *, tls=None):
        """Start a replica and list it."""
        made = FakeReplica(self, name or f"replica-{len(self.replicas)}", tls=tls).__enter__()
        self.replicas.append(made)
        self.listed.append(made.endpoint)
        return made

    def endpoints(self, backbone):
        """Return what is listed, with a new ticket."""
        self.asked.release()
        if not self.listed:
            return Endpoints()
        ticket, key = secrets.token_bytes(24), secrets.token_bytes(32)
        self.tickets[ticket] = (key, time.monotonic() + self.valid_s)
        return Endpoints(tuple(self.listed), ticket, key, self.valid_s, self.replicas_tls, self.tls_name)

    def revoke(self):
        """Forget all tickets, as a cluster does that starts again."""
        self.tickets.clear()

    def __exit__(self, *args):
        """Stop everything."""
        for one in self.replicas:
            one.__exit__(*args)
        super().__exit__(*args)


def main():
    """Run a cluster with one replica until the input ends, then say what was seen."""
    with FakeCluster() as cluster:
        replica = cluster.replica()
        print(cluster.address, cluster.token, flush=True)
        sys.stdin.read()
        counts = {
            "peers": len(set(replica.peers)),
            "tickets": len({ticket for ticket, _, _ in replica.seen}),
            "calls": replica.calls["Extract"],
            "refusals": sum(replica.refusals.values()),
            "by_gateway": cluster.calls["Extract"],
        }
        print(json.dumps(counts), flush=True)


if __name__ == "__main__":
    main()
