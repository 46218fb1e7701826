"""What the Hub says against the metadata of a model card, by the rules that its documentation states and a card could break.

Entered by `faults_of_card`, for `/api/validate-yaml` of the stand-in.
"""

import re

import yaml

# huggingface.co/docs/hub/repositories-licenses
LICENSES = """
apache-2.0 mit openrail bigscience-openrail-m creativeml-openrail-m bigscience-bloom-rail-1.0 bigcode-openrail-m afl-3.0
artistic-2.0 bsl-1.0 bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear c-uda cc cc0-1.0 cc-by-2.0 cc-by-2.5 cc-by-3.0 cc-by-4.0
cc-by-sa-3.0 cc-by-sa-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nd-4.0 cc-by-nc-nd-3.0 cc-by-nc-nd-4.0 cc-by-nc-sa-2.0
cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 cdla-sharing-1.0 cdla-permissive-1.0 cdla-permissive-2.0 wtfpl ecl-2.0 epl-1.0 epl-2.0 etalab-2.0
eupl-1.1 agpl-3.0 gfdl gpl gpl-2.0 gpl-3.0 lgpl lgpl-2.1 lgpl-3.0 isc lppl-1.3c ms-pl mpl-2.0 odc-by odbl openrail++ osl-3.0
postgresql ofl-1.1 ncsa unlicense zlib pddl lgpl-lr deepfloyd-if-license llama2 gemma unknown other
"""
# huggingface.co/docs/hub/model-cards: what a string, or each of a list, must look like
STRINGS = {
    "language": r"[a-z]{2,3}(-\w+)?|code|multilingual",
    "library_name": r".+",
    "pipeline_tag": r"[a-z0-9-]+",
    "tags": r".+",
    "datasets": r"([\w.-]+/)?[\w.-]+",
    "metrics": r"[\w./-]+",
}


def faults_of_card(content):
    """Every rule that a card breaks, in words."""
    front = re.match(r"---\n(.*?)\n---(\n|$)", content, flags=re.DOTALL)
    try:
        data = (yaml.safe_load(front[1]) if front else None) or {}
    except yaml.YAMLError as error:
        return [f"bad YAML: {error}"]
    faults = []
    if data.get("license", "other") not in LICENSES.split():
        faults.append(f'"license" must be one of [{", ".join(LICENSES.split())}]')
    for key, pattern in STRINGS.items():
        given = data.get(key, [])
        values = given if isinstance(given, list) else [given]
        wrong = [value for value in values if not (isinstance(value, str) and re.fullmatch(pattern, value))]
        faults += [f'"{key}" with value {value!r} is not valid' for value in wrong]
    for model in data.get("model-index", []):
        missing = [] if "name" in model else ["name"]
        missing += [f"results.{key}" for result in model.get("results") or [{}] for key in _missing(result)]
        faults += [f'"model-index.{key}" is required' for key in missing]
    return faults


def _missing(result):
    required = {"task": ["type"], "dataset": ["type", "name"], "metrics": ["type", "value"]}
    for part, keys in required.items():
        given = result.get(part) or {}
        for each in given if isinstance(given, list) else [given]:
            yield from (f"{part}.{key}" for key in keys if key not in each)
