"""The files that operators start from are accepted by Ray itself, and hold no key that Ray would ignore."""

import copy
from pathlib import Path

import pytest
import yaml
from trunkline_worker.cluster import apps
from trunkline_worker.cluster.settings import Settings

ROOT = Path(__file__).parents[2]


@pytest.fixture
def launcher():
    return yaml.safe_load((ROOT / "cluster.yaml").read_text())


@pytest.fixture
def serve_config():
    return yaml.safe_load((ROOT / "deploy" / "serve.yaml").read_text())


def validate_launcher(config):
    from ray.autoscaler._private.util import prepare_config, validate_config

    validate_config(prepare_config(config))


def test_ray_accepts_the_cluster_file(launcher):
    validate_launcher(launcher)


def test_ray_refuses_the_cluster_file_with_a_misspelt_key(launcher):
    launcher["min_wokers"] = 1
    with pytest.raises(Exception, match="min_wokers"):
        validate_launcher(launcher)


def test_the_start_commands_never_stop_other_rays_and_ask_for_tokens(launcher):
    commands = launcher["head_start_ray_commands"] + launcher["worker_start_ray_commands"]
    assert commands
    assert all("ray stop" not in command for command in commands)
    assert all("RAY_AUTH_MODE=token" in command for command in commands)


def unknown_keys(config):
    """Return the keys that Serve's schema would take without a word and ignore."""
    from ray.serve.schema import DeploymentSchema, ServeApplicationSchema, ServeDeploySchema

    found = [key for key in config if key not in ServeDeploySchema.model_fields]
    for app in config.get("applications", []):
        found += [key for key in app if key not in ServeApplicationSchema.model_fields]
        for deployment in app.get("deployments", []):
            found += [key for key in deployment if key not in DeploymentSchema.model_fields]
    return found


def test_serve_accepts_its_file_and_knows_every_key(serve_config):
    from ray.serve.schema import ServeDeploySchema

    parsed = ServeDeploySchema.model_validate(copy.deepcopy(serve_config))
    assert [app.name for app in parsed.applications] == ["trunkline-backbone-efficientnet_lite0", apps.GATEWAY_APP]
    assert unknown_keys(serve_config) == []


def test_a_key_that_serve_would_ignore_is_found(serve_config):
    serve_config["proxy_locatoin"] = "Disabled"
    serve_config["applications"][0]["importpath"] = "x"
    assert unknown_keys(serve_config) == ["proxy_locatoin", "importpath"]


def test_the_serve_file_builds_applications_of_the_names_it_gives_them(serve_config):
    backbone, gateway = serve_config["applications"]
    assert backbone["name"] == apps.backbone_app_name(backbone["args"]["name"])
    assert gateway["name"] == apps.GATEWAY_APP
    for app in (backbone, gateway):
        module, _, builder = app["import_path"].partition(":")
        assert module == apps.__name__
        assert getattr(apps, builder)(app["args"]) is not None
    told = [config_of(apps.backbone(backbone["args"])), config_of(apps.gateway(gateway["args"]))]
    assert told[0].backbone_apps == told[1].backbone_apps
    assert told[0].direct.gateway.host == told[1].listener.host


def test_a_setting_that_does_not_exist_is_refused(serve_config):
    args = {**serve_config["applications"][1]["args"], "prot": 1}
    with pytest.raises(ValueError, match="prot"):
        apps.gateway(args)


def test_settings_come_from_arguments_then_environment_then_file(tmp_path, monkeypatch):
    path = tmp_path / "cluster.toml"
    path.write_text('port = 1001\nlanes = 2\nbackbones = ["resnet18"]\n[weights]\nresnet18 = "/w.safetensors"\n')
    monkeypatch.setenv("TRUNKLINE_CLUSTER_CONFIG", str(path))
    monkeypatch.setenv("TRUNKLINE_CLUSTER_PORT", "1002")
    settings = Settings()
    assert (settings.port, settings.lanes, settings.backbones) == (1002, 2, ("resnet18",))
    assert Settings(port=1003).port == 1003
    monkeypatch.setenv("TRUNKLINE_CLUSTER_CONFIG", str(tmp_path / "nothing.toml"))
    with pytest.raises(ValueError, match="not a file"):
        Settings()


@pytest.mark.parametrize(
    ("given", "what"),
    [
        ({"port": 70000}, "port"),
        ({"backbones": ()}, "one backbone or more"),
        ({"backbones": ("a", "a")}, "each once"),
        ({"backbones": ("../x",)}, "not a backbone name"),
        ({"weights": {"vgg16": "/w"}}, "not among the backbones"),
        ({"runtimes": {"vgg16": "torch-fp32"}}, "not among the backbones"),
        ({"runtimes": {"efficientnet_lite0": "tpu"}}, "'tpu' is not a runtime; there are .*torch-fp32"),
        ({"lease_s": 0}, "lease_s"),
        ({"log_level": "LOUD"}, "log_level"),
    ],
)
def test_bad_settings_are_refused_at_once(given, what):
    with pytest.raises(ValueError, match=what):
        Settings(**given)


@pytest.fixture
def own(tmp_path):
    """Make the manifest of a backbone of one's own, in a folder of its name."""

    def make(name, folder=None):
        path = tmp_path / (folder or name) / "backbone.toml"
        path.parent.mkdir()
        path.write_text(
            f'name = "{name}"\nfactory = "net:build"\nweights = "w.safetensors"\n[preprocessing]\ninput_size = 32\n'
            'crop_fraction = 1.0\ninterpolation = "bilinear"\nmean = [0.5, 0.5, 0.5]\nstd = [0.5, 0.5, 0.5]\n'
        )
        return str(path.parent)

    return make


def config_of(app):
    """Return what a Serve application gives its replicas."""
    return app._bound_deployment.init_args[0]


def test_own_backbones_are_served_besides_the_others_in_the_order_that_is_asked_for(own):
    mine, yours = own("mine"), own("yours")
    assert Settings(own_backbones=[mine]).backbones == ("efficientnet_lite0", "mine")
    assert Settings(own_backbones=[mine, yours], backbones=["yours", "resnet18"]).backbones == (
        "yours",
        "resnet18",
        "mine",
    )
    settings = Settings(own_backbones=[mine, yours])
    assert Settings.model_validate_json(settings.model_dump_json()).backbones == settings.backbones
    assert settings.manifest_of("yours") == yours
    assert settings.manifest_of("efficientnet_lite0") is None


def test_replicas_are_told_manifest_and_pictures(own, tmp_path, monkeypatch):
    mine = own("mine")
    monkeypatch.chdir(tmp_path)
    settings = Settings(own_backbones=["mine"], samples="mine")
    config = config_of(apps.build_backbone(settings, "mine"))
    assert (config.name, config.manifest, config.samples) == ("mine", mine, mine)
    other = config_of(apps.build_backbone(Settings(own_backbones=["mine"]), "efficientnet_lite0"))
    assert (other.manifest, other.samples) == (None, None)
    served = config_of(apps.backbone({"name": "mine", "own_backbones": ["mine"]}))
    assert served.manifest == mine


def test_own_backbones_with_a_fault_are_refused_at_once(own, tmp_path):
    mine = own("mine")
    with pytest.raises(ValueError, match="two of your own backbones are called 'mine'"):
        Settings(own_backbones=[mine, own("mine", "again")])
    with pytest.raises(ValueError, match="the weights of 'mine' are named in its manifest"):
        Settings(own_backbones=[mine], weights={"mine": "/w.safetensors"})
    with pytest.raises(ValueError, match=r"expected a folder with a backbone\.toml"):
        Settings(own_backbones=[str(tmp_path / "nothing")])
    (tmp_path / "mine" / "backbone.toml").write_text('title = "x"')
    with pytest.raises(ValueError, match="unknown key 'title'"):
        Settings(own_backbones=[mine])
    with pytest.raises(ValueError, match="is not a folder"):
        Settings(samples=str(tmp_path / "nothing"))


def test_names_of_timm_are_served_by_applications_of_names_without_slashes():
    names = ("timm/resnet18.a1_in1k", "timm/resnet18", "timm.resnet18", "timm-resnet18", "timm_resnet18")
    settings = Settings(backbones=names)
    config = config_of(apps.build_gateway(settings))
    assert [name for name, _ in config.backbone_apps] == list(names)
    found = [app for _, app in config.backbone_apps]
    assert len(set(found)) == len(names)
    assert not any("/" in app for app in found)
    assert config_of(apps.build_backbone(settings, "timm/resnet18")).name == "timm/resnet18"


def test_every_setting_is_documented():
    text = (ROOT / "docs" / "operations.md").read_text()
    missing = [name for name in Settings.model_fields if f"| `{name}` |" not in text]
    assert missing == []
    assert "TRUNKLINE_CLUSTER_PORT" in text
    assert all(field.description for field in Settings.model_fields.values())


def test_what_controller_and_gateway_import_is_free_of_torch():
    import subprocess
    import sys

    code = "import sys, trunkline_worker.cluster.apps; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_port_that_another_gateway_listens_on_is_refused_though_it_could_be_shared():
    import socket

    from trunkline_worker.cluster.deploy import check_port, free_port

    port = free_port("127.0.0.1")
    check_port("127.0.0.1", port)
    with socket.socket() as other:
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        other.bind(("127.0.0.1", port))
        other.listen()
        with pytest.raises(ValueError, match="choose another --port"):
            check_port("127.0.0.1", port)
        with pytest.raises(ValueError, match="choose another --port"):
            check_port("0.0.0.0", port)
    with pytest.raises(ValueError, match=r"cannot listen on 192\.0\.2\.1"):
        check_port("192.0.2.1", port)


def test_replicas_are_told_their_runtime_and_with_how_many_they_share_a_machine(monkeypatch):
    monkeypatch.setenv("TRUNKLINE_CLUSTER_RUNTIMES", '{"resnet18": "onnxruntime-fp32"}')
    settings = Settings(backbones=("efficientnet_lite0", "resnet18"), backbone_replicas=2)
    configs = [config_of(apps.build_backbone(settings, name)) for name in settings.backbones]
    assert [(one.runtime, one.num_replicas, one.num_threads) for one in configs] == [
        (None, 4, 0),
        ("onnxruntime-fp32", 4, 0),
    ]


def test_replicas_are_told_how_to_listen_and_whom_they_may_ask():
    settings = Settings(
        host="10.0.0.1",
        tls_cert="cert.pem",
        tls_key="key.pem",
        tls_client_ca="ca.pem",
        direct_host="0.0.0.0",
        direct_ports="50100-50101",
        direct_tls_name="inside.example",
        backbones=("efficientnet_lite0", "resnet18"),
    )
    config = config_of(apps.build_backbone(settings, "resnet18"))
    assert config.backbone_apps == config_of(apps.build_gateway(settings)).backbone_apps
    direct = config.direct
    assert (direct.host, direct.ports, direct.tls_name) == ("0.0.0.0", (50100, 50101), "inside.example")
    assert (direct.gateway.host, direct.gateway.insecure) == ("10.0.0.1", False)
    assert (direct.gateway.tls_cert, direct.gateway.tls_key, direct.gateway.tls_client_ca) == (
        "cert.pem",
        "key.pem",
        "ca.pem",
    )
    assert config_of(apps.build_backbone(Settings(direct=False), "efficientnet_lite0")).direct is None


def test_replicas_are_not_told_of_port_and_tokens_which_do_not_concern_them():
    told = [
        config_of(apps.build_backbone(Settings(port=port, token_file=tokens), "efficientnet_lite0"))
        for port, tokens in ((1001, "/a"), (1002, "/b"))
    ]
    assert told[0] == told[1]
    assert "/a" not in repr(told[0])


def test_ports_of_replicas_that_are_no_range_are_refused_at_once():
    with pytest.raises(ValueError, match="range of ports"):
        Settings(direct_ports="50200-50100")
