import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
from recipe_samples import BASE, Write

from accrete.pipeline.config.checks import require_data_root
from accrete.pipeline.config.load import load_recipe
from accrete.pipeline.config.problems import RecipeError
from accrete.pipeline.config.run import RunConfig
from accrete.pipeline.errors import ConfigError


def problems(file: Path, *overrides: str) -> list[tuple[str, str, str, str]]:
    with pytest.raises(RecipeError) as caught:
        load_recipe(file, overrides)
    assert isinstance(caught.value, ConfigError)
    assert caught.value.exit_code == 2
    return [(p.where, p.path, p.message, p.hint) for p in caught.value.problems]


def test_a_small_recipe_loads_typed(write: Write) -> None:
    recipe = load_recipe(write("r.yaml", BASE))
    config = recipe.config
    assert type(config) is RunConfig
    assert recipe.name == "r"
    assert [dataclasses.asdict(t)["max_steps"] for t in config.tasks] == [None, 3]
    assert config.train.betas == (0.9, 0.999)
    assert type(config.method).__name__ == "SequentialConfig"
    assert recipe.origins["tasks.1.max_steps"] == "r.yaml:2"
    assert recipe.origins["name"] == "default"


def test_every_resolved_leaf_has_an_origin_and_nothing_else_has(write: Write) -> None:
    recipe = load_recipe(
        write("r.yaml", BASE), ["tasks.0.files={train: [a, b]}", "adapter.targets=[q]"]
    )
    for path in recipe.origins:
        value = recipe.resolved()
        for key in path.split("."):
            value = value[int(key)] if isinstance(value, list) else value[key]
        assert not (isinstance(value, dict) and value)
    assert recipe.origins["tasks.0.files.train"] == "override"
    assert recipe.origins["adapter.targets"] == "override"
    json.dumps(recipe.resolved(), allow_nan=False)


def test_the_dump_loads_to_the_same_configuration(write: Write, tmp_path: Path) -> None:
    file = write("r.yaml", BASE)
    recipe = load_recipe(
        file,
        ["train.eps=1e-12", "description='yes: #no'", "method=ewc_lora", "method.lambda=1e7",
         "tasks.0.labels=['1', 'on', 'null', '1e3']", "data.root=~/rows", "train.max_steps=7"],
    )  # fmt: skip
    recipe.dump_yaml(tmp_path / "dump.yaml")
    again = load_recipe(tmp_path / "dump.yaml")
    assert again.config == recipe.config
    assert again.resolved() == recipe.resolved()
    brief = write("brief.yaml", recipe.to_yaml(origins=False, brief=True))
    assert load_recipe(brief).config == recipe.config
    assert "#" not in brief.read_text().replace("#no", "")
    assert "1e-12  " in recipe.to_yaml().replace("1.0e-12", "1e-12")


def test_all_mistakes_come_at_once_each_with_place_and_cure(write: Write) -> None:
    text = """\
tasks:
  - t1
  - name: t1
  - {name: "a/b", metric: rouge_l}
model:
  path: x/y
  builder: tiny_t6
  gguf: z
method:
  kind: sequential
  lam: 3
train:
  learning_rte: 1e-3
  max_steps: 0
  schedule: cosin
  betas: [1, 2, 3]
  epochs: "3"
engine: {kind: plain, procs: 2}
eval:
  mode: forward
data:
  max_train_examples: true
learning_rate: 3
seed: 1.0
log:
"""
    listed = problems(write("r.yaml", text), "train.lrr=3", "adapter.rank=x", "nonsense")
    assert [(where, path) for where, path, _, _ in listed] == [
        ("r.yaml:3", "tasks.1.name"),
        ("r.yaml:4", "tasks.2.name"),
        ("r.yaml:4", "tasks.2.metric"),
        ("r.yaml:6", "model.path"),
        ("r.yaml:7", "model.builder"),
        ("r.yaml:8", "model.gguf"),
        ("r.yaml:11", "method.lam"),
        ("r.yaml:13", "train.learning_rte"),
        ("r.yaml:14", "train.max_steps"),
        ("r.yaml:15", "train.schedule"),
        ("r.yaml:16", "train.betas"),
        ("r.yaml:17", "train.epochs"),
        ("r.yaml:18", "engine.procs"),
        ("r.yaml:22", "data.max_train_examples"),
        ("r.yaml:23", "learning_rate"),
        ("r.yaml:24", "seed"),
        ("r.yaml:25", "log"),
        ("override nonsense", ""),
        ("override train.lrr=3", "train.lrr"),
        ("override adapter.rank=x", "adapter.rank"),
    ]
    by_path = {path: (message, hint) for _, path, message, hint in listed}
    assert by_path["train.learning_rte"][1] == "did you mean `learning_rate`?"
    assert "weight_decay" in by_path["train.learning_rte"][0]
    assert by_path["learning_rate"][1] == "did you mean `train.learning_rate`?"
    assert by_path["model.gguf"][1] == "did you mean `gguf_file`?"
    assert by_path["model.builder"][1] == "did you mean `tiny_t5`?"
    assert by_path["train.schedule"] == (
        'given: "cosin" (a text); allowed: one of constant, linear, cosine',
        "did you mean `cosine`?",
    )
    assert by_path["train.max_steps"][0] == (
        "given: 0 (an integer); allowed: an integer >= 1, or null"
    )
    assert by_path["train.epochs"][0] == 'given: "3" (a text); allowed: a number > 0'
    assert by_path["train.betas"][0].endswith("allowed: a list of 2 numbers")
    assert by_path["log"][0].startswith("given: null; allowed: a mapping with the keys console")
    text = str(_error(write("r.yaml", text)))
    assert text.splitlines()[0] == "recipe r: 17 problems"
    assert "r.yaml:13: train.learning_rte" in text


def _error(file: Path) -> RecipeError:
    with pytest.raises(RecipeError) as caught:
        load_recipe(file)
    return caught.value


@pytest.mark.parametrize(
    ("override", "allowed"),
    [
        ("seed='1'", "an integer"),
        ("seed=true", "an integer"),
        ("seed=1.0", "an integer"),
        ("seed=null", "an integer"),
        ("train.learning_rate=0", "a number > 0"),
        ("train.learning_rate=false", "a number > 0"),
        ("adapter.dropout=1", "a number >= 0 and < 1"),
        ("adapter.targets=3", "a text, or a list of texts"),
        ("adapter.targets=[q, 3]", "a text"),
        ("engine.zero_stage=4", "one of 0, 1, 2, 3"),
        ("engine.zero_stage='2'", "one of 0, 1, 2, 3"),
        ("log.tensorboard=1", "true or false"),
        ("log.tensorboard=yes", "true or false"),
        ("data.root=3", "a text, or null"),
        ("tasks=[]", "a list of mappings"),
        ("tasks=t1", "a list of mappings"),
        ("tasks.0.files={train: 3}", "a text, or a list of texts"),
        ("tasks.0.columns.input=[1]", "a text"),
        ("train=3", "a mapping with the keys learning_rate"),
        ("method.kind=3", "the name of a method"),
        ("method=[a]", "the name of a method"),
        ("model=3", "a mapping with the keys path"),
    ],
)
def test_nothing_is_converted(write: Write, override: str, allowed: str) -> None:
    listed = problems(write("r.yaml", BASE), override)
    assert len(listed) == 1
    where, path, message, _ = listed[0]
    assert where == f"override {override}"
    assert path.startswith(override.split("=")[0])
    assert f"allowed: {allowed}" in message


@pytest.mark.parametrize(
    ("override", "path", "value"),
    [
        ("train.learning_rate=1e-3", ("train", "learning_rate"), 0.001),
        ("train.learning_rate=1", ("train", "learning_rate"), 1.0),
        ("train.max_steps=null", ("train", "max_steps"), None),
        ("data.eval_split=", None, None),
        ("description=a=b=c", ("description",), "a=b=c"),
        ("adapter.targets=[q, v]", ("adapter", "targets"), ["q", "v"]),
        ("tasks.1.max_steps=5", ("tasks", 1, "max_steps"), 5),
        ("tasks.t2.max_steps=5", ("tasks", 1, "max_steps"), 5),
        ("tasks.t1.max_steps=5", ("tasks", 0, "max_steps"), 5),
        ("tasks.0.columns.input=[a, b]", ("tasks", 0, "columns", "input"), ["a", "b"]),
        ("tasks.0=t9", ("tasks", 0, "name"), "t9"),
        ("tasks=[x, {name: y, epochs: 2}]", ("tasks", 1, "epochs"), 2.0),
        ("train={epochs: 4}", ("train", "epochs"), 4.0),
        ("checkpoint.every_steps=null", ("checkpoint", "every_steps"), None),
    ],
)
def test_overrides(write: Write, override: str, path: tuple[str | int, ...], value: object) -> None:
    file = write("r.yaml", BASE + "train: {max_steps: 9}\n")
    if path is None:
        assert problems(file, override)[0][2].startswith("given: null; allowed: a text")
        return
    got = load_recipe(file, [override]).resolved()
    for key in path:
        got = got[key]  # type: ignore[index]
    assert got == value
    assert type(got) is type(value)


def test_the_last_override_wins_and_a_mapping_merges(write: Write) -> None:
    file = write("r.yaml", BASE + "train: {max_steps: 9}\n")
    config = load_recipe(file, ["seed=1", "train={epochs: 4}", "seed=2"]).config
    assert (config.seed, config.train.max_steps, config.train.epochs) == (2, 9, 4.0)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("tasks.2.max_steps=1", "allowed: 0 to 1, or a name: t1, t2"),
        ("tasks.-1.max_steps=1", "allowed: 0 to 1"),
        ("tasks.t3.max_steps=1", "or a name: t1, t2"),
        ("seed.x=1", "seed is 0 (an integer); there is nothing inside it"),
        ("trian.epochs=1", "did you mean `train`?"),
        ("train.epochs.x=1", "allowed: a number > 0"),
        ("extends=quickstart", "unknown key"),
        ("train.lr=1", "did you mean `learning_rate`?"),
        ("a..b=1", "written `key=value`"),
        ("=1", "written `key=value`"),
        ("seed", "written `key=value`"),
        ("seed=[", "not valid YAML"),
    ],
)
def test_bad_overrides(write: Write, override: str, said: str) -> None:
    listed = problems(write("r.yaml", BASE + "seed: 0\n"), override)
    assert len(listed) == 1
    assert listed[0][0] == f"override {override}"
    assert said in f"{listed[0][2]} {listed[0][3]}"


def test_keyword_fields_are_spelt_without_the_underscore(write: Write) -> None:
    file = write("r.yaml", BASE)
    recipe = load_recipe(file, ["method=ewc_lora", "method.lambda=5"])
    assert recipe.config.method.lambda_ == 5.0  # type: ignore[attr-defined]
    assert recipe.resolved()["method"]["lambda"] == 5.0
    assert recipe.origins["method.lambda"] == "override"
    (listed,) = problems(file, "method=ewc_lora", "method.lambda_=5")
    assert listed[3] == "did you mean `lambda`?"
    (listed,) = problems(file, "method=ewc_lora", "method.lambda=-1")
    assert listed[1:3] == ("method.lambda", "given: -1 (an integer); allowed: a number >= 0")


def test_missing_sections_are_said_once(write: Write) -> None:
    listed = problems(write("r.yaml", "seed: 1\ntasks: [{epochs: 1}]\n"))
    assert [path for _, path, _, _ in listed] == ["method", "model", "tasks.0.name"]
    assert [where for where, _, _, _ in listed] == ["r.yaml:1", "r.yaml:1", "r.yaml:2"]
    listed = problems(write("r.yaml", "model: nosuch\ntasks: [a]\nmethod: nosuch\n"))
    assert sorted(path for _, path, _, _ in listed) == ["method", "model"]


@pytest.mark.parametrize(
    ("change", "path"),
    [
        ("model.path=null", "model"),
        ("model.builder=tiny_t5", "model.path"),
        ("model={path: null, builder: tiny_t5, gguf_file: x}", "model.gguf_file"),
        ("model={path: null, builder: tiny_t5, revision: x}", "model.revision"),
        ("model={path: null, builder: tiny_t5, builder_data: x}", "model.builder_data"),
        ("tasks=[a, A]", "tasks.1.name"),
        ("tasks=[.hidden]", "tasks.0.name"),
        ("tasks=['a b']", "tasks.0.name"),
        ("tasks=['../a']", "tasks.0.name"),
        ("tasks=['']", "tasks.0.name"),
        ("engine={kind: plain, procs: 2}", "engine.procs"),
    ],
)
def test_what_must_fit_together(write: Write, change: str, path: str) -> None:
    assert [p for _, p, _, _ in problems(write("r.yaml", BASE), change)] == [path]


@pytest.mark.parametrize(
    "change",
    [
        "model={path: null, builder: small_t5}",
        "model={path: null, builder: small_t5, builder_data: x}",
        "model={path: x, gguf_file: x}",
        "engine={kind: plain, procs: 1}",
        "engine={kind: plain}",
        "tasks=[{name: a, metric: rouge_l}]",
        "tasks=[super-ni_002.v1]",
    ],
)
def test_what_does_fit_together(write: Write, change: str) -> None:
    load_recipe(write("r.yaml", BASE), [change])


def test_worked_examples_need_a_template_that_shows_them(write: Write) -> None:
    file = write("r.yaml", BASE + "data:\n  examples: 2\n")
    assert load_recipe(file, ["data.template=superni"]).config.data.examples == 2
    for template in ("plain", "olora", "sapt", "raw"):
        [(where, path, message, _)] = problems(file, f"data.template={template}")
        assert (where, path) == ("r.yaml:5", "data")
        assert f"template `{template}` shows no worked examples; allowed: 0" in message
        assert "take `template: superni`" in message


def test_data_root_is_asked_for_with_the_layouts(write: Write) -> None:
    file = write("r.yaml", BASE)
    with pytest.raises(RecipeError, match=r"data\.root") as caught:
        require_data_root(load_recipe(file).config)
    for layout in ("compact", "olora", "sapt", "superni", "trace", "tasl"):
        assert layout in str(caught.value)
    for fine in ("data.root=x", "data.format=generated"):
        require_data_root(load_recipe(file, [fine]).config)
    ids = write(
        "s.yaml", BASE.replace("[t1, {name: t2, max_steps: 3}]", "[{name: t1, dataset: a/b}]")
    )
    require_data_root(load_recipe(ids, ["data.format=hub"]).config)


def test_unknown_recipes(write: Write) -> None:
    for name, said in [
        ("standard_cl/ordre1", "standard_cl/order1"),
        ("recipes/standard_cl/order1.yaml", "did you mean `standard_cl/order1`"),
        ("./gone.yaml", "no such file"),
        ("../standard_cl/order1", "no such file"),
    ]:
        with pytest.raises(ConfigError, match="known recipes") as caught:
            load_recipe(name)
        assert said in str(caught.value)
    for text, said in [("", "it is empty"), ("- a\n", "a list"), ("3\n", "an integer")]:
        (listed,) = problems(write("r.yaml", text))
        assert said in listed[2]


def test_a_file_in_the_working_folder_does_not_hide_a_shipped_name(write: Write) -> None:
    write("standard_cl/order1", BASE)
    assert len(load_recipe("standard_cl/order1").config.tasks) == 4
    write("mine", BASE)
    assert load_recipe("mine").name == "mine"


def test_loading_needs_no_torch_and_is_quick() -> None:
    code = (
        "import sys, time\n"
        "start = time.process_time()\n"
        "from accrete.pipeline.config.load import load_recipe\n"
        "load_recipe('long_sequence/order4', ['method=inc_lora'])\n"
        "heavy = {'torch', 'transformers', 'datasets', 'pandas', 'peft'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "assert time.process_time() - start < 1, time.process_time() - start\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_lines_needs_an_adapter_per_task(write: Write) -> None:
    file = write("r.yaml", BASE + "adapter: {lines: 0.3}\n")
    [(where, path, message, hint)] = problems(file)
    assert (where, path) == ("r.yaml:5", "adapter.lines")
    assert "`method.kind: sequential`" in message
    assert "inc_lora" in hint
    for kind in ("inc_lora", "per_task"):
        assert load_recipe(file, [f"method.kind={kind}"]).config.adapter.lines == 0.3
    for kind in ("no_such_method", "replay"):
        assert problems(file, f"method.kind={kind}")
    assert problems(file, "method.kind=inc_lora", "adapter.lines=1.5")[0][1] == "adapter.lines"


def test_contradicting_replay_settings_are_told_in_the_recipes_terms(write: Write) -> None:
    file = write("r.yaml", BASE)
    given = ["method.kind=replay", "method.memory=reservoir", "method.fraction=0.1"]
    [(where, path, message, _)] = problems(file, *given)
    assert path == "method"
    assert "`fraction`" in message
    assert where
