"""Reads manifests (YAML) from standard input and prints them as a list of JSON, after it validated each, strictly, against
the schemas of the versions of Kubernetes in its arguments. A kind without a schema is reported unless it is one of
--custom KIND."""

import functools
import json
import sys

import jsonschema
import kubernetes_validate
import yaml
from kubernetes_validate import utils

# One process validates many documents: the schemas are read once.
utils.schema_contents = functools.lru_cache(maxsize=None)(utils.schema_contents)


class UniqueKeys(yaml.CSafeLoader if yaml.__with_libyaml__ else yaml.SafeLoader):
    """YAML parsers take the last of two equal keys without a word; API servers refuse them when asked strictly."""

    def construct_mapping(self, node, deep=False):
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        if len(keys) != len(set(keys)):
            raise yaml.constructor.ConstructorError(None, None, f"a key stands twice among {keys}", node.start_mark)
        return super().construct_mapping(node, deep)


custom, versions = set(), []
arguments = iter(sys.argv[1:])
for argument in arguments:
    if argument == "--custom":
        custom.add(next(arguments))
    else:
        versions.append(argument)

documents = [document for document in yaml.load_all(sys.stdin, Loader=UniqueKeys) if document]
for document in documents:
    name = f"{document['kind']} {document['metadata']['name']}"
    if document["kind"] in custom:
        continue
    for version in versions:
        try:
            kubernetes_validate.validate(document, version, strict=True)
        except kubernetes_validate.ValidationError as error:
            path = ".".join(map(str, error.path))
            sys.exit(f"{name}: Kubernetes {version}: {path}: {error.message}")
        except kubernetes_validate.SchemaNotFoundError as error:
            sys.exit(f"{name}: {error.message}")
json.dump(documents, sys.stdout)
