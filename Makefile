# Needs Python >= 3.11, pip and make; everything else is installed under .venv/. uv is used where it works, for speed only.
#
#   make demo       the main job, for real, in a terminal
#   make test       lint, types, the suite; the client tests also on the oldest SDK and on other Pythons found here
#   make test-frameworks  the agents and chains, each in an environment of its own
#   make bench      the figures        make chaos   the suite with its long forms
#   make docs       the pages, in site/
#   make cassettes  record the HTTP recordings again
#   make screenshots  take the pictures in docs/ again; needs Chromium

.PHONY: test suite compat on-oldest on-3.12 on-3.13 test-frameworks lint types demo bench chaos docs cassettes screenshots clean
.NOTPARALLEL:
.DELETE_ON_ERROR:
.SUFFIXES:

export PIP_DISABLE_PIP_VERSION_CHECK := 1
export UV_PYTHON_DOWNLOADS := never

# The first of $(1) that runs at all (a pyenv shim may not) and for which the Python expression $(2) holds.
first = $(shell for p in $(1); do "$$p" -c 'import sys; v = sys.version_info[:2]; sys.exit(not ($(2)))' 2>/dev/null </dev/null && echo "$$p" && break; done)

PYTHON := $(call first,python3.11 python3.12 python3.13 python3 python,v >= (3, 11))
other = $(call first,python3.$(1) "$$(uv python find 3.$(1) 2>/dev/null)" "$$(pyenv root 2>/dev/null)"/versions/3.$(1).*/bin/python3.$(1),v == (3, $(1)))

# An environment is made anew when pyproject.toml, a framework's release or the interpreter changes, whatever the clock says.
key := $(firstword $(shell { cat pyproject.toml tests/frameworks/requirements/*.txt; echo '$(PYTHON)'; } | cksum))
stamp = .venv/$(1)/made-$(key)

# $(call environment,INTERPRETER,REQUIREMENTS): pip runs from outside, so that an interpreter without ensurepip will do.
define environment
@test -n '$(1)' || { echo 'Python 3.11 or newer was not found.' >&2; exit 1; }
@echo "Installing $(2) into $(@D) ($(1))"
@rm -rf $(@D)
@if uv --version >/dev/null 2>&1; then \
	uv venv -q --python '$(1)' $(@D) && uv pip install -q --python $(@D)/bin/python $(2); \
else \
	'$(1)' -m venv --without-pip $(@D) && '$(1)' -m pip --python $(@D)/bin/python install -q $(2); \
fi
@touch $@
endef

new := $(call stamp,new)
# Most tests wait for something else: three processes keep two cores busy.
pytest := -m pytest -n 3
# What depends on the SDK: the clients, and the provider that their tests stand on.
sdk_tests := tests/client tests/test_provider.py
# The agents and chains that take our clients. Two of them, one for each major release of the SDK that they pin, are enough for every day.
frameworks := $(basename $(notdir $(wildcard tests/frameworks/requirements/*.txt)))
two_frameworks := llama-index pydantic-ai

# The suite comes last: its closing lines are the ones that count.
test: lint types compat $(two_frameworks:%=with-%) suite

suite: $(new)
	.venv/new/bin/python $(pytest)

lint: $(new)
	.venv/new/bin/ruff check .
	.venv/new/bin/ruff format --check .

types: $(new)
	.venv/new/bin/mypy
	.venv/new/bin/pyright --pythonpath .venv/new/bin/python

compat: on-oldest on-3.12 on-3.13

on-oldest: $(call stamp,oldest)
	.venv/oldest/bin/python $(pytest) $(sdk_tests)

on-3.12 on-3.13: on-3.%:
	@python='$(call other,$*)'; if [ -z "$$python" ]; then \
		echo 'Python 3.$* is not installed here: its run is left out.'; \
	else \
		$(MAKE) --no-print-directory .venv/3.$*/made-$(key) found="$$python" && \
		echo ".venv/3.$*/bin/python $(pytest) $(sdk_tests)" && .venv/3.$*/bin/python $(pytest) $(sdk_tests); \
	fi

test-frameworks: $(frameworks:%=with-%)

.PHONY: $(frameworks:%=with-%)
$(frameworks:%=with-%): with-%: $(call stamp,%)
	.venv/$*/bin/python -m pytest tests/frameworks

demo: $(call stamp,demo)
	@.venv/demo/bin/metered-ai demo

bench: $(new)
	.venv/new/bin/python -m benchmarks

chaos: $(new)
	METERED_AI_LONG=1 .venv/new/bin/python $(pytest) --timeout 3600

docs: $(call stamp,docs)
	.venv/docs/bin/python docs/promises.py
	.venv/docs/bin/python docs/reference.py
	.venv/docs/bin/zensical build --clean

cassettes: $(new)
	.venv/new/bin/python cassettes/record.py

screenshots: $(new)
	.venv/new/bin/python -m docs.screenshots

clean:
	rm -rf .venv dist site .hypothesis .mypy_cache .pytest_cache .ruff_cache

$(new):
	$(call environment,$(PYTHON),-e '.[dev]')

$(call stamp,oldest):
	$(call environment,$(PYTHON),-e '.[test]' 'openai==2.54.0')

$(call stamp,3.%):
	$(call environment,$(found),-e '.[test]')

$(foreach name,$(frameworks),$(call stamp,$(name))): $(call stamp,%):
	$(call environment,$(PYTHON),-e '.[test]' -r tests/frameworks/requirements/$*.txt)

$(call stamp,demo):
	$(call environment,$(PYTHON),-e '.[demo]')

$(call stamp,docs):
	$(call environment,$(PYTHON),-e '.[docs]')
