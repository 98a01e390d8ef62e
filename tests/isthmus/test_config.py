from __future__ import annotations

import base64
from typing import TYPE_CHECKING, Any

import pytest

from isthmus.commands.run import _SETTINGS
from isthmus.config import CompressionConfig, Config, ConfigError, parse_listen
from isthmus.config_sources import flag_name, load_config, setting_types, variable_name

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

KEY = base64.b64encode(b"k" * 32).decode()


def load(
    directory: Path,
    text: str | None = None,
    environ: Mapping[str, str] | None = None,
    **flags: Any,
) -> Config:
    """Load a configuration; in names of flags `__` stands for the dot."""
    file = None
    if text is not None:
        file = directory / "isthmus.toml"
        file.write_text(text, "utf-8")
    dotted = {name.replace("__", "."): value for name, value in flags.items()}
    return load_config(file, dotted, {"XDG_STATE_HOME": str(directory), **(environ or {})})


def refusal(
    directory: Path, text: str | None = None, environ: Mapping[str, str] | None = None, **flags: Any
) -> str:
    with pytest.raises(ConfigError) as caught:
        load(directory, text, environ, **flags)
    return str(caught.value).replace(f"{directory}/", "")


class TestDefaults:
    def test_nothing_said_is_a_valid_configuration_that_only_this_machine_reaches(
        self, tmp_path: Path
    ) -> None:
        config = load(tmp_path)
        listeners = (config.proxy.listen, config.admin.listen, config.gossip.listen)
        assert {parse_listen(address)[0] for address in listeners} == {"127.0.0.1"}
        assert config.region == "local"
        assert config.workers == 1

    def test_fly_machine_says_its_own_name_and_region(self, tmp_path: Path) -> None:
        config = load(tmp_path, environ={"FLY_MACHINE_ID": "4d89", "FLY_REGION": "gru"})
        assert (config.node, config.region) == ("4d89", "gru")

    @pytest.mark.parametrize(
        ("host", "node"),
        [("web-1.example.com", "web-1"), ("a_b", "a-b"), ("---", "node"), ("x" * 62 + "-y", "x" * 62)],
    )
    def test_name_of_the_host_becomes_a_name_of_a_node(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, host: str, node: str
    ) -> None:
        monkeypatch.setattr("socket.gethostname", lambda: host)
        assert load(tmp_path).node == node

    def test_root_keeps_state_in_var_lib_and_others_at_home(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("os.geteuid", lambda: 0)
        assert load(tmp_path).data == "/var/lib/isthmus"
        monkeypatch.setattr("os.geteuid", lambda: 1000)
        assert load(tmp_path).data == str(tmp_path / "isthmus")
        monkeypatch.setenv("HOME", "/home/someone")
        assert load_config(None, {}, {}).data == "/home/someone/.local/state/isthmus"


class TestPrecedence:
    def test_flags_beat_environment_beats_file(self, tmp_path: Path) -> None:
        text = 'node = "file"\nregion = "ams"\nworkers = 2\n'
        environ = {"ISTHMUS_NODE": "environment", "ISTHMUS_REGION": "gru"}
        config = load(tmp_path, text, environ, node="flag", region=None)
        assert (config.node, config.region, config.workers) == ("flag", "gru", 2)

    def test_file_beats_what_fly_says(self, tmp_path: Path) -> None:
        assert load(tmp_path, 'region = "ams"', {"FLY_REGION": "gru"}).region == "ams"

    def test_flag_of_an_app_replaces_the_apps_of_the_file(self, tmp_path: Path) -> None:
        text = '[[apps]]\nname = "old"\n'
        config = load(tmp_path, text, apps=[{"name": "new", "machines": [{"address": "127.0.0.1:9"}]}])
        assert [app.name for app in config.apps] == ["new"]

    def test_variables_are_read_as_their_setting_wants_them(self, tmp_path: Path) -> None:
        environ = {
            "ISTHMUS_WORKERS": "3",
            "ISTHMUS_GOSSIP__JOIN": "a:1, b:2,",
            "ISTHMUS_GOSSIP__CLUSTER": "42",
            "ISTHMUS_PROXY__CLIENT_ROUTING": "False",
            "ISTHMUS_PROXY__TRUSTED_PROXIES": "",
        }
        config = load(tmp_path, 'proxy.trusted_proxies = ["10.0.0.0/8"]', environ)
        assert config.workers == 3
        assert config.gossip.join == ("a:1", "b:2")
        assert config.gossip.cluster == "42"
        assert config.proxy.client_routing is False
        assert config.proxy.trusted_proxies == ()

    def test_variables_of_the_command_line_are_no_settings(self, tmp_path: Path) -> None:
        environ = {"ISTHMUS_ADMIN": "x", "ISTHMUS_CONFIG": "x", "ISTHMUS_TOKEN": "x"}
        assert load(tmp_path, environ=environ).admin.token == ""


# (text of the file, what the refusal begins with, what else is in it)
WRONG_FILES = {
    "unknown key at top level": ('nod = "a"', "isthmus.toml:1: unknown key `nod`", "did you mean `node`?"),
    "unknown section": ("[prxy]\n", "isthmus.toml:1: unknown key `prxy`", ""),
    "unknown key in a section": (
        'node = "a"\n[proxy]\nlisten = "127.0.0.1:1"\nlisen = "x"',
        "isthmus.toml:4: unknown key `proxy.lisen`",
        "did you mean `proxy.listen`?",
    ),
    "unknown key in an app": (
        '[[apps]]\nname = "a"\n[[apps]]\nname = "b"\nhost = ["x"]',
        "isthmus.toml:5: unknown key `apps[1].host`",
        "did you mean `apps.hosts`?",
    ),
    "unknown key in a machine": (
        '[[apps]]\nname = "a"\n[[apps.machines]]\naddress = "a:1"\n[[apps.machines]]\nadress = "b:1"',
        "isthmus.toml:6: unknown key `apps[0].machines[1].adress`",
        "did you mean `apps.machines.address`?",
    ),
    "unknown key in a check": (
        '[[apps]]\nname = "a"\n[[apps.checks]]\nintervall_ms = 1',
        "isthmus.toml:4: unknown key `apps[0].checks[0].intervall_ms`",
        "did you mean `apps.checks.interval_ms`?",
    ),
    "unknown key in a region": (
        "[regions.aaa]\nlatitude = 1\nlongitude = 1\n[regions.bbb]\nlatitud = 1\nlongitude = 1",
        "isthmus.toml:5: unknown key `regions.bbb.latitud`",
        "did you mean `regions.*.latitude`?",
    ),
    "unknown key without a near one": ("whatever = 1", "isthmus.toml:1: unknown key `whatever`", ""),
    "number for text": ("node = 5", "isthmus.toml:1: node: expected `str`, got `int`", ""),
    "text for a number": ('workers = "2"', "isthmus.toml:1: workers: expected `int`, got `str`", ""),
    "value for a section": ("proxy = 1", "isthmus.toml:1: proxy: expected `object`, got `int`", ""),
    "too small": ("\nworkers = -1", "isthmus.toml:2: workers: expected `int` >= 0", ""),
    "zero timeout": ("[proxy]\nhead_timeout_ms = 0", "isthmus.toml:2: proxy.head_timeout_ms: ", ">= 1"),
    "no address": (
        '[proxy]\n\nlisten = "8080"',
        "isthmus.toml:3: proxy.listen: `8080` is not an address",
        "host:port",
    ),
    "port too large": ('admin.listen = "127.0.0.1:70000"', "isthmus.toml:1: admin.listen: ", "above 65535"),
    "no network": (
        '[proxy]\ntrusted_proxies = ["10.0.0.1/8"]',
        "isthmus.toml:2: proxy.trusted_proxies: ",
        "10.0.0.1/8",
    ),
    "same listener twice": (
        '[proxy]\nlisten = "127.0.0.1:8471"',
        "isthmus.toml",
        "admin.listen: 127.0.0.1:8471 is proxy.listen as well; choose another port",
    ),
    "port for raw TCP that another section has": (
        '[tls]\nlisten = "127.0.0.1:443"\ncertificates = ["x"]\n[[tcp]]\nlisten = "127.0.0.1:443"\napp = "a"',
        "isthmus.toml:5: tcp[0].listen: 127.0.0.1:443 is tls.listen as well; choose another port",
        "",
    ),
    "port for raw TCP twice": (
        '[[tcp]]\nlisten = "a:1"\napp = "a"\n[[tcp]]\nlisten = "a:1"\napp = "b"',
        "isthmus.toml:5: tcp[1].listen: a:1 is tcp[0].listen as well; choose another port",
        "",
    ),
    "port for raw TCP of no app": (
        '[[tcp]]\nlisten = "a:1"\napp = "A!"',
        "isthmus.toml:3: tcp[0].app: ",
        "A!",
    ),
    "unknown key of a port": ('[[tcp]]\nlisen = "a:1"', "isthmus.toml:2: ", "did you mean `tcp.listen`?"),
    "service twice": (
        '[[apps]]\nname = "a"\n[[apps.services]]\nport = 1\n[[apps.services]]\nport = 1',
        "isthmus.toml:6: apps[0].services[1].port: port 1 is declared twice",
        "",
    ),
    "limits of a service": (
        '[[apps]]\nname = "a"\n[[apps.services]]\nport = 1\nsoft_limit = 3\nhard_limit = 2',
        "isthmus.toml:6: apps[0].services[0].hard_limit: 2 is below soft_limit 3",
        "",
    ),
    "peer without a port": (
        '[gossip]\njoin = ["a:1", "b"]',
        "isthmus.toml:2: gossip.join: `b` is not an address",
        "",
    ),
    "peer with port 0": ('[gossip]\njoin = ["a:0"]', "isthmus.toml:2: gossip.join: `a:0` has port 0", ""),
    "key that is none": ('[gossip]\nkeys = ["c2hvcnQ="]', "isthmus.toml:2: gossip.keys: ", "`isthmus key`"),
    "key that is not base64": (
        '[gossip]\nkeys = ["!"]',
        "isthmus.toml:2: gossip.keys: ",
        "32 bytes in base64",
    ),
    "too many keys": (f"[gossip]\nkeys = {[KEY] * 5}", "isthmus.toml:2: gossip.keys: ", "<= 4"),
    "keys in two places": (
        f'[gossip]\nkeys = ["{KEY}"]\nkeys_file = "/etc/keys"',
        "isthmus.toml:3: gossip.keys_file: gossip.keys is set as well",
        "keep one of the two",
    ),
    "certificate without its key": (
        '[gossip]\ntls_cert = "a.crt"\ntls_ca = "ca.crt"',
        "isthmus.toml",
        "gossip.tls_key: tls_cert, tls_key and tls_ca go together",
    ),
    "TLS beyond loopback without a key": (
        '[gossip]\nlisten = "10.0.0.1:8472"\ntls_cert = "a"\ntls_key = "b"\ntls_ca = "c"',
        "isthmus.toml:2: gossip.listen: 10.0.0.1:8472 is open to others: set gossip.keys",
        "`isthmus key`",
    ),
    "others told of an address without a key": (
        '[gossip]\nadvertise = "10.0.0.1:8472"',
        "isthmus.toml:2: gossip.advertise: 10.0.0.1:8472 is where others are: set gossip.keys",
        "`isthmus key`",
    ),
    "another machine to join without a key": (
        '[gossip]\njoin = ["one.example:8472", "10.0.0.1:8472"]',
        "isthmus.toml:2: gossip.join: 10.0.0.1:8472 is another machine: set gossip.keys on both",
        "`isthmus key`",
    ),
    "another machine to join from loopback": (
        f'[gossip]\nkeys = ["{KEY}"]\njoin = ["10.0.0.1:8472"]',
        "isthmus.toml:3: gossip.join: 10.0.0.1:8472 is another machine, which 127.0.0.1:8472 cannot talk to",
        "set gossip.listen",
    ),
    "cluster without a name": ('[gossip]\ncluster = ""', "isthmus.toml:2: gossip.cluster: ", ">= 1"),
    "open gossip without a key": (
        '[gossip]\nlisten = "0.0.0.0:8472"',
        "isthmus.toml:2: gossip.listen: 0.0.0.0:8472 is open to others: set gossip.keys",
        "`isthmus key`",
    ),
    "gossip on all addresses without telling which": (
        f'[gossip]\nkeys = ["{KEY}"]\nlisten = "[::]:8472"',
        "isthmus.toml:3: gossip.listen: [::]:8472 is no address that others could be told",
        "gossip.advertise",
    ),
    "open peering without a key": (
        '[peering]\nlisten = "10.0.0.1:8473"',
        "isthmus.toml:2: peering.listen: 10.0.0.1:8473 is open to others: set gossip.keys",
        "`isthmus key`",
    ),
    "peering on all addresses without telling which": (
        f'[gossip]\nkeys = ["{KEY}"]\n[peering]\nlisten = "0.0.0.0:8473"',
        "isthmus.toml:4: peering.listen: 0.0.0.0:8473 is no address that others could be told",
        "peering.advertise",
    ),
    "peering where gossip is": (
        '[peering]\nlisten = "127.0.0.1:8472"',
        "isthmus.toml: gossip.listen: 127.0.0.1:8472 is peering.listen as well",
        "choose another port",
    ),
    "network of peering that is none": (
        '[peering]\nnetworks = ["10.0.0.1/8"]',
        "isthmus.toml:2: peering.networks: 10.0.0.1/8 has host bits set",
        "",
    ),
    "open admin without a token": (
        '[admin]\nlisten = "0.0.0.0:8471"',
        "isthmus.toml:2: admin.listen: 0.0.0.0:8471 is open to others: set admin.token",
        "127.0.0.1",
    ),
    "unknown region": (
        'region = "amz"',
        "isthmus.toml:1: region: unknown region `amz`",
        "did you mean `ams`?",
    ),
    "region far from all": (
        'region = "moon"',
        "isthmus.toml:1: region: unknown region `moon`",
        "[regions.moon]",
    ),
    "unknown region of a machine": (
        '[[apps]]\nname = "a"\n[[apps.machines]]\naddress = "a:1"\nregion = "grv"',
        "isthmus.toml:5: apps[0].machines[0].region: unknown region `grv`",
        "did you mean `gru`?",
    ),
    "region off the globe": (
        "[regions.lab]\nlatitude = 91\nlongitude = 0",
        "isthmus.toml:2: regions.lab.latitude: ",
        "<= 90",
    ),
    "code of an area": (
        "[regions.eu]\nlatitude = 1\nlongitude = 0",
        "isthmus.toml:1: regions.eu: ",
        "no code",
    ),
    "code in capitals": (
        "[regions.LAB]\nlatitude = 1\nlongitude = 0",
        "isthmus.toml:1: regions.LAB: ",
        "no code",
    ),
    "name of a node": ('node = "a b"', "isthmus.toml:1: node: `a b` is no name for a node", ""),
    "no data directory": ('data = ""', "isthmus.toml:1: data: ", "needs a name"),
    "data directory that no system has": ('data = "a\\u0000b"', "isthmus.toml:1: data: ", "NUL"),
    "name of an app": (
        '[[apps]]\nname = "Web"',
        "isthmus.toml:2: apps[0].name: `Web` is no name for an app",
        "a-z",
    ),
    "app without a name": (
        '[[apps]]\nhosts = ["a"]',
        "isthmus.toml:1: apps[0]: object missing required field `name`",
        "",
    ),
    "app twice": (
        '[[apps]]\nname = "a"\n[[apps]]\nname = "a"',
        "isthmus.toml:4: apps[1].name: app `a` is declared twice",
        "",
    ),
    "host name": (
        '[[apps]]\nname = "a"\nhosts = ["ok", "a b"]',
        "isthmus.toml:3: apps[0].hosts: `a b` is not a host name",
        "`*.suffix`",
    ),
    "half an IPv4 address as host": (
        '[[apps]]\nname = "a"\nhosts = ["1.2"]',
        "isthmus.toml:3: apps[0].hosts: ",
        "`1.2`",
    ),
    "host of two apps": (
        '[[apps]]\nname = "a"\n[[apps]]\nname = "b"',
        "isthmus.toml:3: apps[1].hosts: host `*` at / already leads to app `a`",
        "",
    ),
    "relative path prefix": (
        '[[apps]]\nname = "a"\npath_prefix = "api"',
        "isthmus.toml:3: apps[0].path_prefix: ",
        "'/'",
    ),
    "path prefix that routing refuses": (
        '[[apps]]\nname = "a"\npath_prefix = "/a/../b"',
        "isthmus.toml:3: apps[0].path_prefix: ",
        "",
    ),
    "hard limit below soft limit": (
        '[[apps]]\nname = "a"\nsoft_limit = 5\nhard_limit = 4',
        "isthmus.toml:4: apps[0].hard_limit: 4 is below soft_limit 5",
        "",
    ),
    "a PROXY header before TLS to machines": (
        '[[apps]]\nname = "a"\nproxy_protocol = "v1"\nmachine_tls = true',
        "isthmus.toml:3: apps[0].proxy_protocol: it does not go together with machine_tls",
        "",
    ),
    "more bytes than an option holds": (
        '[[apps]]\nname = "a"\nbody_bytes_max = 9007199254740992',
        "isthmus.toml:3: apps[0].body_bytes_max: ",
        "",
    ),
    "limit that no database holds": (
        '[[apps]]\nname = "a"\nsoft_limit = 9223372036854775808',
        "isthmus.toml:3: apps[0].soft_limit: ",
        "",
    ),
    "check that would never run": (
        f'[[apps]]\nname = "a"\n[[apps.checks]]\ninterval_ms = 1{"0" * 400}',
        "isthmus.toml:4: apps[0].checks[0].interval_ms: ",
        "",
    ),
    "address of a machine": (
        '[[apps]]\nname = "a"\nmachines = [{ address = "a:1" }, { address = "nowhere" }]',
        "isthmus.toml:3: apps[0].machines[1].address: `nowhere` names no port, and the app has no",
        "",
    ),
    "machine with port 0": (
        '[[apps]]\nname = "a"\n[[apps.machines]]\naddress = "a:0"',
        "isthmus.toml:4: apps[0].machines[0].address: ",
        "1 to 65535",
    ),
    "id of a machine": (
        '[[apps]]\nname = "a"\n[[apps.machines]]\naddress = "a:1"\nid = "a b"',
        "isthmus.toml:5: apps[0].machines[0].id: `a b` is no name for a machine",
        "",
    ),
    "machine twice": (
        (
            '[[apps]]\nname = "a"\n[[apps.machines]]\naddress = "a:1"\nid = "m"'
            '\n[[apps.machines]]\naddress = "a:2"\nid = "m"'
        ),
        "isthmus.toml:8: apps[0].machines[1].id: machine `m` is declared twice",
        "",
    ),
    "path of a check": (
        '[[apps]]\nname = "a"\n[[apps.checks]]\npath = "up"',
        "isthmus.toml:4: apps[0].checks[0].path: `up` must start with /",
        "",
    ),
    "type of a check": (
        '[[apps]]\nname = "a"\n[[apps.checks]]\ntype = "ping"',
        "isthmus.toml:4: apps[0].checks[0].type: ",
        "'ping'",
    ),
    "check too often": (
        '[[apps]]\nname = "a"\n[[apps.checks]]\ninterval_ms = 1',
        "isthmus.toml:4: apps[0].checks[0].interval_ms: ",
        ">= 100",
    ),
    "check twice": (
        '[[apps]]\nname = "a"\n[[apps.checks]]\nname = "up"\n[[apps.checks]]\nname = "up"',
        "isthmus.toml:6: apps[0].checks[1].name: check `up` is declared twice",
        "",
    ),
    "form of the log": ('[log]\nformat = "xml"', "isthmus.toml:2: log.format: ", "'xml'"),
    "not TOML": ("node = \n", "isthmus.toml: ", "line 1"),
}


@pytest.mark.parametrize("case", WRONG_FILES)
def test_wrong_file_is_refused_with_its_line_and_the_way_out(tmp_path: Path, case: str) -> None:
    text, start, also = WRONG_FILES[case]
    told = refusal(tmp_path, text)
    assert told.startswith(start)
    assert also in told
    assert "\n" not in told


WRONG_VARIABLES = {
    "unknown": (
        "ISTHMUS_WORKER",
        "2",
        "environment variable ISTHMUS_WORKER is no setting; did you mean ISTHMUS_WORKERS?",
    ),
    "unknown in a section": (
        "ISTHMUS_GOSSIP__JION",
        "a:1",
        "environment variable ISTHMUS_GOSSIP__JION is no setting; did you mean ISTHMUS_GOSSIP__JOIN?",
    ),
    "unlike any": ("ISTHMUS_XYZZY", "1", "environment variable ISTHMUS_XYZZY is no setting"),
    "apps": ("ISTHMUS_APPS", "[]", "environment variable ISTHMUS_APPS is no setting"),
    "no number": (
        "ISTHMUS_WORKERS",
        "two",
        "environment variable ISTHMUS_WORKERS: workers: expected `int`, got `str`",
    ),
    "nearly a number": (
        "ISTHMUS_WORKERS",
        "--2",
        "environment variable ISTHMUS_WORKERS: workers: expected `int`, got `str`",
    ),
    "digits of another script": (
        "ISTHMUS_WORKERS",
        "²",
        "environment variable ISTHMUS_WORKERS: workers: expected `int`, got `str`",
    ),
    "neither true nor false": (
        "ISTHMUS_PROXY__CLIENT_ROUTING",
        "maybe",
        "environment variable ISTHMUS_PROXY__CLIENT_ROUTING: proxy.client_routing: expected `bool`",
    ),
    "no address": (
        "ISTHMUS_PROXY__LISTEN",
        "x",
        "environment variable ISTHMUS_PROXY__LISTEN: proxy.listen: `x` is not an address",
    ),
    "one of many": (
        "ISTHMUS_GOSSIP__JOIN",
        "a:1,b",
        "environment variable ISTHMUS_GOSSIP__JOIN: gossip.join: `b` is not an address",
    ),
    "of Fly": ("FLY_REGION", "xx!", "environment variable FLY_REGION: region: unknown region `xx!`"),
}


@pytest.mark.parametrize("case", WRONG_VARIABLES)
def test_wrong_variable_is_refused_by_its_name(tmp_path: Path, case: str) -> None:
    variable, value, start = WRONG_VARIABLES[case]
    assert refusal(tmp_path, 'log.level = "info"', {variable: value}).startswith(start)


WRONG_FLAGS: dict[str, tuple[dict[str, Any], str]] = {
    "listen": ({"proxy__listen": "x"}, "flag --listen: proxy.listen: `x` is not an address"),
    "admin": (
        {"admin__listen": "0.0.0.0:1"},
        "flag --admin-listen: admin.listen: 0.0.0.0:1 is open to others",
    ),
    "join": ({"gossip__join": ["x"]}, "flag --join: gossip.join: `x` is not an address"),
    "advertise": ({"gossip__advertise": "x"}, "flag --advertise: gossip.advertise: `x` is not an address"),
    "region": ({"region": "amz"}, "flag --region: region: unknown region `amz`; did you mean `ams`?"),
    "app": ({"apps": [{"name": "A"}]}, "flag --app: apps[0].name: `A` is no name for an app"),
    "host": ({"apps": [{"name": "a", "hosts": ["-"]}]}, "flag --host: apps[0].hosts: `-` is not a host name"),
    "machine": (
        {"apps": [{"name": "a", "machines": [{"address": "x"}]}]},
        "flag --machine: apps[0].machines[0].address: `x` names no port",
    ),
    "check": (
        {"apps": [{"name": "a", "checks": [{"path": "x"}]}]},
        "flag --check: apps[0].checks[0].path: `x` must start with /",
    ),
}


@pytest.mark.parametrize("case", WRONG_FLAGS)
def test_wrong_flag_is_refused_by_its_name(tmp_path: Path, case: str) -> None:
    flags, start = WRONG_FLAGS[case]
    assert refusal(tmp_path, 'proxy.listen = "127.0.0.1:1"', **flags).startswith(start)


def test_flags_that_are_named_in_refusals_exist() -> None:
    for flag, setting in _SETTINGS.items():
        assert flag_name(setting) == f"--{flag.replace('_', '-')}"


def test_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot read .*/none\.toml: No such file"):
        load_config(tmp_path / "none.toml", {}, {})
    binary = tmp_path / "binary.toml"
    binary.write_bytes(b"\xff")
    with pytest.raises(ConfigError, match=r"cannot read .*/binary\.toml: .*utf-8"):
        load_config(binary, {}, {})


def test_whole_file_is_understood(tmp_path: Path) -> None:
    config = load(
        tmp_path,
        f"""
        node = "n1"
        data = "{tmp_path}"
        region = "lab"
        workers = 0
        [gossip]
        listen = "0.0.0.0:8472"
        advertise = "10.0.0.1:8472"
        join = ["nodes.internal:8472", "[fdaa::3]:8472"]
        keys = ["{KEY}"]
        [admin]
        listen = "[::]:8471"
        token = "t"
        [regions.lab]
        latitude = 1.5
        longitude = -2
        [[apps]]
        name = "web"
        hosts = ["Example.com", "*.example.com", "192.0.2.1"]
        path_prefix = "/api/"
        hard_limit = 30
        [[apps.machines]]
        address = "[::1]:8000"
        region = "ams"
        [[apps.checks]]
        type = "tcp"
        """,
    )
    assert config.gossip.decoded_keys() == (b"k" * 32,)
    assert config.regions["lab"].longitude == -2
    assert config.apps[0].machines[0].region == "ams"
    assert config.apps[0].checks[0].type == "tcp"
    assert config.database.parent == config.feed_socket.parent == tmp_path


def test_variable_names_lead_back_to_their_settings(tmp_path: Path) -> None:
    for setting in setting_types():
        name = variable_name(setting)
        assert name.removeprefix("ISTHMUS_").lower().replace("__", ".") == setting


@pytest.mark.parametrize(
    ("text", "parts"),
    [("a:0", ("a", 0)), ("[::1]:80", ("::1", 80)), ("x.internal:65535", ("x.internal", 65535))],
)
def test_addresses_are_split(text: str, parts: tuple[str, int]) -> None:
    assert parse_listen(text) == parts


@pytest.mark.parametrize(
    "text", ["", "a", ":80", "a:", "::1:80", "a b:1", "u@a:1", "http://a:1", "a:1/", "a:-1"]
)
def test_what_is_no_address_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is not an address"):
        parse_listen(text)


def test_limits_by_table_are_read_from_file_and_environment(tmp_path: Path) -> None:
    file = tmp_path / "isthmus.toml"
    file.write_text("[replication.table_writes_per_s]\nmachines = 200\n")
    assert load_config(file, {}, {}).replication.table_writes_per_s == {"machines": 200}
    variable = {"ISTHMUS_REPLICATION__TABLE_WRITES_PER_S": "checks=50, machines=7"}
    limits = load_config(file, {}, variable).replication.table_writes_per_s
    assert limits == {"checks": 50, "machines": 7}
    for wrong in ("checks", "checks=-1", "checks=x", "=", "checks=1.5"):
        with pytest.raises(ConfigError, match="TABLE_WRITES_PER_S"):
            load_config(None, {}, {"ISTHMUS_REPLICATION__TABLE_WRITES_PER_S": wrong})


def test_tracing_is_set_by_the_environment_as_by_a_file(tmp_path: Path) -> None:
    file = tmp_path / "isthmus.toml"
    file.write_text('[tracing]\nendpoint = "https://c:4318/x"\nratio = 0.5\nheaders = { a = "1" }\n')
    told = load_config(file, {}, {}).tracing
    environ = {
        "ISTHMUS_TRACING__ENDPOINT": "https://c:4318/x",
        "ISTHMUS_TRACING__RATIO": "0.5",
        "ISTHMUS_TRACING__HEADERS": "a=1",
    }
    assert load_config(None, {}, environ).tracing == told
    assert (told.ratio, told.headers) == (0.5, {"a": "1"})


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ('endpoint = "c:4318"', "is not of the form"),
        ('endpoint = "ftp://c"', "is not of the form"),
        ('endpoint = "http://u:p@c:4318"', "is not of the form"),
        ('endpoint = "http://c:99999"', "tracing.endpoint"),
        ("ratio = 1.5", "tracing.ratio"),
        ('headers = { "a b" = "x" }', "no header"),
        ('headers = { a = "x\\ny" }', "no header"),
    ],
)
def test_tracing_that_could_not_work_is_refused(tmp_path: Path, line: str, problem: str) -> None:
    file = tmp_path / "isthmus.toml"
    file.write_text(f"[tracing]\n{line}\n")
    with pytest.raises(ConfigError, match=problem):
        load_config(file, {}, {})


def test_compression_of_an_app_is_checked_when_it_is_read(tmp_path: Path) -> None:
    file = tmp_path / "isthmus.toml"
    file.write_text('[[apps]]\nname = "a"\n[apps.compression]\ncodings = ["gzip"]\n')
    (app,) = load_config(file, {}, {}).apps
    assert isinstance(app.compression, CompressionConfig)
    assert app.compression.codings == ("gzip",)
    file.write_text('[[apps]]\nname = "a"\n[apps.compression]\ngzip_level = 10\n')
    with pytest.raises(ConfigError, match=r"isthmus.toml:4: apps\[0\].compression.gzip_level"):
        load_config(file, {}, {})
