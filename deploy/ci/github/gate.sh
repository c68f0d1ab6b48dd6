#!/usr/bin/env bash
# The step "Gate" of action.yml: GATE_* and the runner's variables in, outputs and a summary out. The exit code is that of
# `safer-audit gate`; inconclusive ends with 0 under GATE_INCONCLUSIVE=warn. Nothing else than a verdict of pass is a pass.
set -euo pipefail

folder=$(mktemp -d "$RUNNER_TEMP/safer-audit-gate.XXXXXX")
verdict=error code=2 audit=$GATE_AUDIT gate=$GATE_GATE told=''

# $1 where it is an id and no more.
id_of() {
    if [[ $1 =~ ^[A-Za-z0-9_-]{1,64}$ ]]; then echo "$1"; fi
}

# Tell the runner how it ended, in its log and as outputs, and leave. $1: what to say, on one line.
finish() {
    {
        echo "verdict=$verdict"
        echo "exit-code=$code"
        echo "audit=$(id_of "$audit")"
        echo "gate=$(id_of "$gate")"
        if [ -n "$told" ]; then printf '%s\n' "json=$folder/gate.json" "junit=$folder/junit.xml" "markdown=$folder/gate.md"; fi
    } >> "$GITHUB_OUTPUT"
    if [ "$verdict" = error ] && [ -n "${GITHUB_STEP_SUMMARY:-}" ]; then
        printf '## Reward model gate: no verdict\n\n%s (exit code %s). The log says more.\n' "$1" "$code" >> "$GITHUB_STEP_SUMMARY"
    fi
    local level=error
    case $verdict in
        pass) level=notice ;;
        inconclusive) if [ "$GATE_INCONCLUSIVE" = warn ]; then level=warning code=0; fi ;;
    esac
    echo "::$level title=Reward model gate::$1"
    exit "$code"
}

# --$1=$2, unless $2 is empty.
option() {
    if [ -n "$2" ]; then arguments+=("--$1=$2"); fi
}

# $1 before each line of $2 that is not empty, as one argument.
each_line() {
    local line
    while IFS= read -r line; do
        line=${line%$'\r'}
        if [ -n "$line" ]; then arguments+=("$1$line"); fi
    done <<< "$2"
}

if [ -n "$GATE_URL" ]; then export SAFER_AUDIT_URL=$GATE_URL; fi
if [ -n "$GATE_TOKEN" ]; then export SAFER_AUDIT_TOKEN=$GATE_TOKEN; fi
unset GATE_TOKEN
case ${SAFER_AUDIT_TOKEN:-} in
    '') ;;
    *[$'\r\n']*) finish "the token has more than one line" ;;
    *) echo "::add-mask::${SAFER_AUDIT_TOKEN//%/%25}" ;;
esac
case $GATE_INCONCLUSIVE in
    fail | warn) ;;
    *) finish "the input inconclusive is to be fail or warn" ;;
esac
if [ -z "$GATE_BASELINE" ]; then finish "the input baseline is empty: write none where that is meant"; fi
if [ -z "$GATE_POLICY" ]; then finish "the input policy is empty"; fi

arguments=(--json "--junit=$folder/junit.xml" "--markdown=$folder/gate.md")
option report "$GATE_REPORT"
option audit "$GATE_AUDIT"
option gate "$GATE_GATE"
option model "$GATE_MODEL"
option dataset "$GATE_DATASET"
option eval-dataset "$GATE_EVAL_DATASET"
option spec "$GATE_SPEC"
if [ "$GATE_BASELINE" != none ]; then option baseline "$GATE_BASELINE"; fi
if [ -z "$GATE_GATE" ] || [ "$GATE_POLICY" != default ]; then option policy "$GATE_POLICY"; fi
case $GATE_WAIT in
    true) arguments+=(--wait) ;;
    false) arguments+=(--detach) ;;
    *) finish "the input wait is to be true or false" ;;
esac
each_line --label= "$GATE_LABELS"
each_line "" "$GATE_ARGS"
command=$RUNNER_TEMP/safer-audit/bin/safer-audit
if [ "$GATE_INSTALL" = none ]; then command=safer-audit; fi

# A report may name an axis like a command of the runner: until the word that nobody can guess, the runner reads no commands.
# stderr goes where stdout went, so that none of it comes after that word.
word=$(od -An -N16 -tx1 /dev/urandom | tr -d ' \n')
echo "::stop-commands::$word"
code=0
# shellcheck disable=SC2069
"$command" gate check "${arguments[@]}" 2>&1 > "$folder/gate.json" || code=$?
if [ -s "$folder/gate.md" ]; then cat "$folder/gate.md"; fi
echo "::$word::"

# The exit code and the decision must agree, whatever was given in args (--help ends with 0). A gate that was only posted has no
# verdict yet, but ids.
read_json='import json, sys
document = json.load(open(sys.argv[1], encoding="utf-8"))
print(document["verdict"] or "", document.get("id", ""), document.get("audit", ""), sep="\n")'
read_from=$("$GATE_PYTHON" -I -c "$read_json" "$folder/gate.json" 2> /dev/null) || read_from=''
{ read -r told && read -r id && read -r job; } <<< "$read_from" || id='' job=''
case $code:$told in
    0:pass | 1:fail | 3:inconclusive) verdict=$told ;;
    3:) verdict=inconclusive gate=${id:-$gate} audit=${job:-$audit} ;;
    0:*) code=4 told='' ;;
    *) told='' ;;
esac
finish "$verdict"
