"""A matrix as an Indexed Job of Kubernetes, and a suspended job that merges the results. Pure.

The facts are of the reference of batch/v1: an index that fails for good is one of podFailurePolicy's or has used up
backoffLimitPerIndex; a pod that a node's drain ended has the condition DisruptionTarget; $(JOB_COMPLETION_INDEX) in
arguments is the index. Text and not a library's objects, because people read and change it. JSON's strings are YAML's.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass

from vmkit.errors import ConfigError
from vmkit.matrix.emit.batch import Batch

MATRIX_FOLDER = "/matrix"
RESULTS_FOLDER = "/results"
# A ConfigMap holds at most 1 MiB, and the names of its keys count.
MAX_CONFIG_BYTES = 1000 * 1000
MERGE_RESOURCES = {"cpu": "1", "memory": "512Mi"}
_KEY = "matrix.toml"
_LAST_SHORT = 0xFFFF


@dataclass(frozen=True, slots=True)
class ClusterChoice:
    """What the cluster's user chooses. image: the container image, which has vmkit and the guests' images.

    claim: the PersistentVolumeClaim for the results, which several nodes write to. parallel: pods at once.
    kvm_resource: the extended resource of a device plugin that gives /dev/kvm. matrix_text: the matrix file for a
    ConfigMap; None where the container image has the file.
    """

    image: str
    claim: str
    parallel: int
    kvm_resource: str | None
    matrix_text: str | None


_HEAD = """\
# {count} {tasks} of a vmkit matrix as a Kubernetes Job. `vmkit matrix emit kubernetes` wrote this file.
#   kubectl apply -f FILE
#   kubectl get job {name} --watch     # until it is Complete or Failed
#   kubectl patch job {name}-merge --patch '{{"spec": {{"suspend": false}}}}'
# An index fails for good when a test failed. After a failure of the machine or the node, another pod runs it again.
"""

_CONFIG_MAP = """\
apiVersion: v1
kind: ConfigMap
metadata:
  name: {name}
data:
  {key}: {text}
---
"""

_JOB = """\
apiVersion: batch/v1
kind: Job
metadata:
  name: {name}
spec:
  completionMode: Indexed
  completions: {count}
  parallelism: {parallel}
  backoffLimitPerIndex: {retries}
  maxFailedIndexes: {count}
  podFailurePolicy:
    rules:
      # 1: a test failed. 124: the time was over. Another pod would end in the same way.
      - action: FailIndex
        onExitCodes: {{containerName: cell, operator: In, values: [1, 124]}}
      # 64: the matrix file is wrong, for all indexes.
      - action: FailJob
        onExitCodes: {{containerName: cell, operator: In, values: [64]}}
      # The node was drained or the pod evicted. This does not count against the limit of the index.
      - action: Ignore
        onPodConditions: [{{type: DisruptionTarget, status: "True"}}]
      # 125 and all else, such as a container that ran out of memory, counts: the machine or the node failed.
  template:
    spec:
      activeDeadlineSeconds: {limit_s}
      containers:
        - name: cell
          args: {args}
{container}
{pod}
"""

_MERGE = """\
---
apiVersion: batch/v1
kind: Job
metadata:
  name: {name}-merge
spec:
  suspend: true
  backoffLimit: 2
  template:
    spec:
      containers:
        - name: merge
          args: {args}
{container}
{pod}
"""

# The file system of the container is read-only. The files of machines and the disks of guests are below /run/vmkit.
_CONTAINER = """\
          image: {image}
          env:
            # A node is often a virtual machine itself, and its own vsock leads to the node's host.
            - {{name: VSH_AF_VSOCK, value: deny}}
            - {{name: VMKIT_RUNTIME_DIR, value: /run/vmkit/run}}
            # All users may write to an emptyDir, and vmkit trusts no folder in such a one. /dev/shm has the sticky bit.
            - {{name: VMKIT_STATE_DIR, value: /dev/shm/vmkit}}
            - {{name: TMPDIR, value: /run/vmkit}}
          resources:
            # The guest's memory and vmkit's own. Equal values let no pod of another kind take the memory.
            requests: {resources}
            limits: {resources}
          securityContext:
            allowPrivilegeEscalation: false
            readOnlyRootFilesystem: true
            capabilities: {{drop: [ALL]}}
          volumeMounts:
            - {{name: work, mountPath: /run/vmkit}}
            - {{name: results, mountPath: {results}}}"""

_CONFIG_MOUNT = """
            - {{name: matrix, mountPath: {folder}, readOnly: true}}"""

_POD = """\
      restartPolicy: Never
      automountServiceAccountToken: false
      enableServiceLinks: false
      securityContext:
        runAsNonRoot: true
        runAsUser: 1000
        runAsGroup: 1000
        fsGroup: 1000
        seccompProfile: {{type: RuntimeDefault}}
      volumes:
        - {{name: work, emptyDir: {{sizeLimit: 2Gi}}}}
        - {{name: results, persistentVolumeClaim: {{claimName: {claim}}}}}"""

_CONFIG_VOLUME = """
        - {{name: matrix, configMap: {{name: {name}}}}}"""


def render_kubernetes(batch: Batch, choice: ClusterChoice) -> str:
    """Returns the manifests as YAML. Raises ConfigError for a matrix file that no ConfigMap can hold."""
    text = choice.matrix_text
    if text is not None and len(text.encode()) > MAX_CONFIG_BYTES:
        raise ConfigError(
            f"the matrix has more than {MAX_CONFIG_BYTES} bytes, and a ConfigMap cannot hold it",
            hint="put it into the container image, and name it with --file-in-image",
        )
    file = batch.file if text is None else f"{MATRIX_FOLDER}/{_KEY}"
    picked = batch.shard_words if batch.is_sharded else ("--cell", "$(JOB_COMPLETION_INDEX)")
    run = ["vmkit", "matrix", "run", file, *picked, "--to", RESULTS_FOLDER]
    merge = ["vmkit", "matrix", "merge", RESULTS_FOLDER, "--to", f"{RESULTS_FOLDER}/merged"]
    resources = {"cpu": str(batch.cpus), "memory": f"{batch.memory_mib}Mi"}
    if choice.kvm_resource:
        resources[choice.kvm_resource] = "1"
    job = _JOB.format(
        name=batch.name,
        count=batch.count,
        parallel=min(choice.parallel, batch.count),
        retries=batch.retries,
        limit_s=batch.limit_s,
        args=_quote(run),
        container=_render_container(choice, resources),
        pod=_render_pod(batch, choice),
    )
    merging = _MERGE.format(
        name=batch.name,
        args=_quote(merge),
        container=_render_container(choice, MERGE_RESOURCES),
        pod=_render_pod(batch, choice),
    )
    config = "" if text is None else _CONFIG_MAP.format(name=batch.name, key=_KEY, text=_quote(text))
    tasks = "shards" if batch.is_sharded else "cells"
    return _HEAD.format(count=batch.count, tasks=tasks, name=batch.name) + config + job + merging


def _render_container(choice: ClusterChoice, resources: Mapping[str, str]) -> str:
    mount = "" if choice.matrix_text is None else _CONFIG_MOUNT.format(folder=MATRIX_FOLDER)
    image, amounts = _quote(choice.image), _quote(resources)
    return _CONTAINER.format(image=image, resources=amounts, results=RESULTS_FOLDER) + mount


def _render_pod(batch: Batch, choice: ClusterChoice) -> str:
    volume = "" if choice.matrix_text is None else _CONFIG_VOLUME.format(name=batch.name)
    return _POD.format(claim=_quote(choice.claim)) + volume


def _quote(value: object) -> str:
    """Returns JSON that is YAML, too: YAML joins no surrogates, and takes no control characters as they are."""
    text = json.dumps(value, ensure_ascii=False)
    return "".join(char if char.isprintable() else _escape(ord(char)) for char in text)


def _escape(code: int) -> str:
    return f"\\u{code:04x}" if code <= _LAST_SHORT else f"\\U{code:08x}"
