"""The examples, run as users run them. The demo itself is run by `make demo`, which CI does too."""

import re
import subprocess
import sys
from pathlib import Path

import grpc
import pytest
from clusters import trunkline_command

pytestmark = pytest.mark.ray

EXAMPLES = Path(__file__).parents[2] / "examples"


def run(cluster, *arguments):
    return subprocess.run(
        [sys.executable, *arguments], env=cluster.environment, capture_output=True, text=True, timeout=200, check=False
    )


def test_quickstart_then_plain_grpc_on_the_model_it_trained(cluster):
    quickstart = run(cluster, str(EXAMPLES / "quickstart.py"))
    assert quickstart.returncode == 0, quickstart.stderr
    predicted = re.findall(r"'(\d)'", quickstart.stdout.partition("right:")[0])
    right = re.findall(r"\d", quickstart.stdout.partition("right:")[2])
    assert len(predicted) == len(right) == 10
    assert sum(one == other for one, other in zip(predicted, right, strict=True)) >= 7

    token_file = cluster.state_dir / "token"
    plain = run(cluster, str(EXAMPLES / "plain_grpc.py"), "--address", cluster.address, "--token-file", str(token_file))
    assert plain.returncode == 0, plain.stderr
    assert "efficientnet_lite0" in plain.stdout
    assert "digits-head@1" in plain.stdout


def test_grpc_without_stubs_through_reflection(cluster):
    """What grpcurl does: learn the service from the server, make messages of it, call."""
    from google.protobuf import descriptor_pool, message_factory
    from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

    metadata = (("authorization", f"Bearer {cluster.token}"),)
    with grpc.insecure_channel(cluster.address) as channel:
        with_token = grpc.intercept_channel(channel, _WithMetadata(metadata))
        database = ProtoReflectionDescriptorDatabase(with_token)
        assert "trunkline_wire.v1.CatalogService" in database.get_services()
        pool = descriptor_pool.DescriptorPool(database)
        service = pool.FindServiceByName("trunkline_wire.v1.CatalogService")
        method = service.FindMethodByName("ListBackbones")
        request = message_factory.GetMessageClass(method.input_type)()
        reply_class = message_factory.GetMessageClass(method.output_type)
        call = channel.unary_unary(
            f"/{service.full_name}/{method.name}",
            request_serializer=type(request).SerializeToString,
            response_deserializer=reply_class.FromString,
        )
        [backbone] = call(request, metadata=metadata, timeout=30).backbones
        assert backbone.name == "efficientnet_lite0"


class _WithMetadata(grpc.StreamStreamClientInterceptor):
    """Adds metadata to every stream: grpc-reflection's own client cannot carry a token."""

    def __init__(self, metadata):
        self._metadata = metadata

    def intercept_stream_stream(self, continuation, details, requests):
        return continuation(details._replace(metadata=self._metadata), requests)


def test_every_command_prints_help():
    done = subprocess.run(trunkline_command("--help"), capture_output=True, text=True, check=True)
    for name in (
        "up",
        "down",
        "serve",
        "status",
        "backbones",
        "upload",
        "train",
        "jobs",
        "models",
        "predict",
        "doctor",
    ):
        assert name in done.stdout
        helped = subprocess.run(trunkline_command(name, "--help"), capture_output=True, text=True, check=False)
        assert helped.returncode == 0, helped.stderr
