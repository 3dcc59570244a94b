from typer.testing import CliRunner

from gateway.commands.tenant import app
from gateway.tenants.keys import hash_key
from gateway.tenants.roster import load_roster
from kvindex.errors import ConfigError


def run(*arguments, **options):
    return CliRunner().invoke(app, arguments, **options)


def test_a_new_key_and_its_line_make_a_file_that_knows_the_key(tmp_path):
    key, line = run("key", "--note", "Ann's laptop").stdout.splitlines()
    file = tmp_path / "tenants.yaml"
    file.write_text(f"tenants:\n- name: acme\n  keys:\n  {line}\n")
    assert load_roster(file).caller(key).tenant == "acme"
    assert "# Ann's laptop" in line
    assert key not in line
    found = run("check", str(file))
    assert found.exit_code == 0
    assert "acme" in found.stdout


def test_the_line_of_a_key_that_one_has(tmp_path):
    assert run("hash", input="my key\n").stdout == f"- sha256: {hash_key('my key')}\n"
    assert isinstance(run("hash", input="").exception, ConfigError)


def test_a_wrong_file_is_said_to_be_wrong(tmp_path):
    file = tmp_path / "tenants.yaml"
    file.write_text("tenants: 7")
    assert isinstance(run("check", str(file)).exception, ConfigError)
