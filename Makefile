# Thin commands over `uv run`; .ci/setup.sh makes the environment once, and again when what it depends on has changed.
# ARGS goes to the command: make demo ARGS=--quick, make test ARGS="-k golden -x"

# The set-up may have installed uv while make was running, so this is looked up when a command needs it.
UV = $(shell if [ -x .uv/bin/uv ]; then echo .uv/bin/uv; else echo uv; fi)
RUN = $(UV) run --no-sync
INPUTS = pyproject.toml .ci/constraints.txt .ci/setup.sh

.PHONY: help setup demo libero aloha test test-libero test-aloha test-pusht test-next lint types pusht
.DEFAULT_GOAL := help

help:  ## this list
	@sed -n 's/^\([a-z-]*\):.*  ## \(.*\)/  make \1\t\2/p' Makefile | expand -t 20

setup: .venv/ready  ## make the environment in .venv

demo: .venv/ready  ## record demonstrations in Meta-World, train a small π0, evaluate it (ARGS: --quick, --policy=pi05)
	$(RUN) lerobot-pi0 demo $(ARGS)

libero: .venv-libero/ready  ## the same in LIBERO, in .venv-libero
	.venv-libero/bin/lerobot-pi0 demo --suite=libero $(ARGS)

aloha: .venv-aloha/ready  ## the same in ALOHA, in .venv-aloha
	.venv-aloha/bin/lerobot-pi0 demo --suite=aloha $(ARGS)

test: .venv/ready  ## the tests, in two processes (ARGS=-n0: in one)
	$(RUN) pytest -n 2 $(ARGS)

test-libero: .venv-libero/ready  ## the tests that need LIBERO (ARGS: -m "not slow")
	.venv-libero/bin/pytest tests/demo/test_libero.py tests/simulators/test_libero_pipeline.py $(ARGS)

test-aloha: .venv-aloha/ready  ## the tests that need gym-aloha
	.venv-aloha/bin/pytest tests/demo/test_aloha_suite.py tests/simulators/test_aloha_pipeline.py $(ARGS)

test-pusht: .venv-pusht/ready  ## the tests that need gym-pusht
	.venv-pusht/bin/pytest tests/simulators/test_pusht_doctor.py $(ARGS)

test-next: .venv/ready  ## the tests on a checkout of LeRobot, in .venv-next: make test-next LEROBOT=FOLDER
	@.ci/setup.sh next "$(LEROBOT)"
	.venv-next/bin/pytest -n 2 $(ARGS)

lint: .venv/ready  ## ruff: rules and format
	$(RUN) ruff check
	$(RUN) ruff format --check

types: .venv/ready  ## pyrefly
	$(RUN) pyrefly check

PUSHT_ARGS = --policy.type=lerobot_pi0 --policy.device=cpu --policy.dtype=float32 --policy.tokenizer=small \
  --policy.vision.image_size=56 --policy.vision.width=32 --policy.vision.depth=2 --policy.vision.mlp_dim=64 \
  --policy.vision.num_heads=2 --policy.vlm.width=32 --policy.vlm.depth=2 --policy.vlm.mlp_dim=64 \
  --policy.vlm.num_heads=2 --policy.vlm.head_dim=16 --policy.expert.width=32 --policy.expert.mlp_dim=64 \
  --policy.chunk_size=8 --policy.n_action_steps=8 --env.type=pusht --env.episode_length=30 \
  --eval.n_episodes=1 --eval.batch_size=1 --output_dir=outputs/pusht

pusht: .venv-pusht/ready  ## a tiny untrained policy through lerobot-eval on gym-pusht, in .venv-pusht
	.venv-pusht/bin/lerobot-eval $(PUSHT_ARGS) $(ARGS)

.venv/ready: $(INPUTS)
	@.ci/setup.sh

.venv-%/ready: .venv/ready $(INPUTS)
	@.ci/setup.sh $*
