"""Manifests and Dockerfile: valid, consistent with each other, and with what the proxy does."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import kubernetes_validate
import yaml
from twisted.trial.unittest import SynchronousTestCase

from strictproxy.admin.documents import autoscaling_document
from strictproxy.config import DnsSource, load, parse
from strictproxy.config.model import KubernetesSource
from strictproxy.metrics import Counters, ProcessFigures, ProxyCollector, new_latency
from strictproxy.snapshot import UpstreamSnapshot

ROOT = Path(__file__).parent.parent
BASE = ROOT / "k8s" / "base"
KUBERNETES = "1.34"


def documents(folder: Path) -> list[dict[str, Any]]:
    """Return the manifests that a kustomization lists."""
    listed = yaml.safe_load((folder / "kustomization.yaml").read_text())["resources"]
    return [
        document for name in listed for document in yaml.safe_load_all((folder / name).read_text())
    ]


class ManifestTests(SynchronousTestCase):
    def test_schemas(self) -> None:
        """Every manifest is valid against Kubernetes' own schemas, strictly."""
        manifests = documents(BASE)
        self.assertEqual(
            sorted((m["kind"], m["metadata"]["name"]) for m in manifests),
            [
                ("Deployment", "strictproxy"),
                ("Deployment", "transcode"),
                ("NetworkPolicy", "strictproxy"),
                ("NetworkPolicy", "transcode"),
                ("PodDisruptionBudget", "strictproxy"),
                ("PodDisruptionBudget", "transcode"),
                ("Service", "transcode"),
                ("Service", "transcode-pods"),
                ("ServiceAccount", "strictproxy"),
            ],
        )
        for manifest in manifests:
            kubernetes_validate.validate(manifest, KUBERNETES, strict=True)

    def test_schema_check_can_fail(self) -> None:
        """A misspelt field is found."""
        broken = documents(BASE)[0] | {"specc": {}}
        with self.assertRaises(kubernetes_validate.ValidationError):
            kubernetes_validate.validate(broken, KUBERNETES, strict=True)

    def test_fit_together(self) -> None:
        """Names, ports and times of the manifests and of the configuration agree."""
        by_name = {(m["kind"], m["metadata"]["name"]): m for m in documents(BASE)}
        config = load(BASE / "strictproxy.yaml", {"POD_NAMESPACE": "media"})
        source = config.upstreams["transcode"].source
        assert isinstance(source, DnsSource)
        headless = by_name["Service", "transcode-pods"]
        self.assertEqual(headless["spec"]["clusterIP"], "None")
        self.assertEqual(source.name, "transcode-pods.media.svc.cluster.local")
        example = by_name["Deployment", "transcode"]["spec"]["template"]
        self.assertEqual(headless["spec"]["selector"], example["metadata"]["labels"])
        pod = by_name["Deployment", "strictproxy"]["spec"]["template"]["spec"]
        (container,) = pod["containers"]
        ports = {port["name"]: port["containerPort"] for port in container["ports"]}
        self.assertEqual([each.endpoint for each in config.listen], [f"tcp:{ports['http']}"])
        assert config.admin is not None
        self.assertEqual(config.admin.endpoint, f"tcp:{ports['admin']}")
        self.assertGreater(pod["terminationGracePeriodSeconds"], config.drain_timeout)
        security = container["securityContext"]
        self.assertTrue(security["readOnlyRootFilesystem"])
        self.assertTrue(pod["securityContext"]["runAsNonRoot"])

    def test_kustomize(self) -> None:
        """Everything that the kustomization names is there; kubectl, if it is here, builds it."""
        kustomization = yaml.safe_load((BASE / "kustomization.yaml").read_text())
        (generator,) = kustomization["configMapGenerator"]
        for name in (*kustomization["resources"], *generator["files"]):
            self.assertTrue((BASE / name).exists(), name)
        deployment = (BASE / "deployment.yaml").read_text()
        self.assertIn(f"configMap: {{name: {generator['name']}}}", deployment)
        if shutil.which("kubectl") is None:
            return
        done = subprocess.run(
            ["kubectl", "kustomize", str(BASE)], capture_output=True, text=True, check=False
        )
        self.assertEqual(done.returncode, 0, done.stderr)
        kinds = [document["kind"] for document in yaml.safe_load_all(done.stdout)]
        self.assertIn("ConfigMap", kinds)


class EndpointSliceOverlayTests(SynchronousTestCase):
    folder = ROOT / "k8s" / "overlays" / "endpointslices"

    def test_role_is_what_is_used(self) -> None:
        """The role allows the two calls that are made, and nothing else."""
        role, binding = yaml.safe_load_all((self.folder / "rbac.yaml").read_text())
        for manifest in (role, binding):
            kubernetes_validate.validate(manifest, KUBERNETES, strict=True)
        rule = {
            "apiGroups": ["discovery.k8s.io"],
            "resources": ["endpointslices"],
            "verbs": ["list", "watch"],
        }
        self.assertEqual(role["rules"], [rule])
        self.assertEqual(binding["roleRef"]["name"], role["metadata"]["name"])
        account = yaml.safe_load((BASE / "serviceaccount.yaml").read_text())
        self.assertEqual(binding["subjects"][0]["name"], account["metadata"]["name"])

    def test_configuration(self) -> None:
        """It names the headless Service of the base, and its port."""
        source = load(self.folder / "strictproxy.yaml").upstreams["transcode"].source
        assert isinstance(source, KubernetesSource)
        service = yaml.safe_load((BASE / "headless.yaml").read_text())
        self.assertEqual(source.service, service["metadata"]["name"])
        self.assertEqual(source.port, service["spec"]["ports"][0]["name"])

    def test_kustomize(self) -> None:
        """Its files are there; kubectl, if it is here, builds it with the token mounted."""
        kustomization = yaml.safe_load((self.folder / "kustomization.yaml").read_text())
        for name in (*kustomization["resources"], "strictproxy.yaml"):
            self.assertTrue((self.folder / name).exists(), name)
        if shutil.which("kubectl") is None:
            return
        done = subprocess.run(
            ["kubectl", "kustomize", str(self.folder)], capture_output=True, text=True, check=False
        )
        self.assertEqual(done.returncode, 0, done.stderr)
        built = {(m["kind"], m["metadata"]["name"]): m for m in yaml.safe_load_all(done.stdout)}
        pod = built["Deployment", "strictproxy"]["spec"]["template"]["spec"]
        self.assertIs(pod["automountServiceAccountToken"], True)


#: Kinds that Kubernetes itself does not know: what must be in their spec.
CUSTOM = {
    "PodMonitor": {"selector", "podMetricsEndpoints"},
    "PrometheusRule": {"groups"},
    "ScaledObject": {"scaleTargetRef", "triggers"},
    "TriggerAuthentication": {"secretTargetRef"},
}


class OverlayTests(SynchronousTestCase):
    """What kubectl makes of each overlay; where there is no kubectl, of its own files."""

    def manifests(self, name: str) -> list[dict[str, Any]]:
        folder = ROOT / "k8s" / "overlays" / name
        if shutil.which("kubectl") is not None:
            done = subprocess.run(
                ["kubectl", "kustomize", str(folder)], capture_output=True, text=True, check=False
            )
            self.assertEqual(done.returncode, 0, done.stderr)
            return list(yaml.safe_load_all(done.stdout))
        listed = yaml.safe_load((folder / "kustomization.yaml").read_text())["resources"]
        files = [folder / each for each in listed if each.endswith(".yaml")]
        return [document for file in files for document in yaml.safe_load_all(file.read_text())]

    def check_schemas(self, manifests: list[dict[str, Any]]) -> None:
        for manifest in manifests:
            needed = CUSTOM.get(manifest["kind"])
            if needed is None:
                kubernetes_validate.validate(manifest, KUBERNETES, strict=True)
            else:
                self.assertLessEqual(needed, manifest["spec"].keys())

    def test_schemas(self) -> None:
        """Every overlay is valid, and so is the configuration it brings."""
        folders = sorted(path.name for path in (ROOT / "k8s" / "overlays").iterdir())
        self.assertEqual(folders, ["endpointslices", "hpa", "keda", "monitoring", "tasks", "tls"])
        for name in folders:
            self.check_schemas(self.manifests(name))
            config = ROOT / "k8s" / "overlays" / name / "strictproxy.yaml"
            if config.exists():
                load(config, {"POD_NAMESPACE": "media"})

    def test_tasks(self) -> None:
        """The directory of the configuration is the volume's, which has more room than is used."""
        folder = ROOT / "k8s" / "overlays" / "tasks"
        tasks = load(folder / "strictproxy.yaml", {"POD_NAMESPACE": "media"}).tasks
        assert tasks is not None
        text = (folder / "kustomization.yaml").read_text()
        self.assertIn(f"mountPath: {tasks.directory}}}", text)
        claim = yaml.safe_load((folder / "volume.yaml").read_text())
        self.assertIn(f"claimName: {claim['metadata']['name']}}}", text)
        room = claim["spec"]["resources"]["requests"]["storage"]
        self.assertGreater(int(room.removesuffix("Gi")) * 2**30, tasks.max_size)

    def test_autoscaling(self) -> None:
        """What autoscalers read is what the proxy tells."""
        folder = ROOT / "k8s" / "overlays"
        hpa = yaml.safe_load((folder / "hpa" / "hpa.yaml").read_text())
        metric = hpa["spec"]["metrics"][0]["external"]["metric"]
        names = (ROOT / "strictproxy" / "metrics.py").read_text()
        self.assertIn(f'"{metric["name"].removeprefix("strictproxy_upstream_")}"', names)
        scaled = list(yaml.safe_load_all((folder / "keda" / "scaledobject.yaml").read_text()))[-1]
        wanted = scaled["spec"]["triggers"][0]["metadata"]
        snapshot = UpstreamSnapshot("u", True, (), 3, 4, 4, 2, False, 0, 0.0, 0, None)
        self.assertEqual(autoscaling_document(snapshot)[wanted["valueLocation"]], 4)
        config = load(folder / "keda" / "strictproxy.yaml", {"POD_NAMESPACE": "media"})
        upstream = metric["selector"]["matchLabels"]["upstream"]
        self.assertIn(upstream, config.upstreams)
        self.assertIn(f"/upstreams/{upstream}/autoscaling", wanted["url"])

    def test_rules(self) -> None:
        """The operator's object has the very rules that are tested."""
        folder = ROOT / "k8s" / "monitoring"
        rules = yaml.safe_load((folder / "alerts.yaml").read_text())
        self.assertEqual(
            yaml.safe_load((folder / "prometheusrule.yaml").read_text())["spec"], rules
        )
        docs = (ROOT / "docs" / "operations.md").read_text()
        for rule in rules["groups"][0]["rules"]:
            self.assertIn(f"**{rule['alert']}**", docs)

    def test_grafana(self) -> None:
        """The dashboard and the alerts ask for metrics that there are."""
        folder = ROOT / "k8s" / "monitoring"
        dashboard = json.loads((folder / "dashboard.json").read_text())
        panels = dashboard["panels"]
        self.assertEqual(len({panel["id"] for panel in panels}), len(panels))
        asked = " ".join(each["expr"] for panel in panels for each in panel["targets"])
        asked += (folder / "alerts.yaml").read_text()
        families = ProxyCollector(Counters(), list, ProcessFigures, new_latency()).collect()
        known = set()
        for family in families:
            known |= {f"{family.name}{end}" for end in ("", "_total", "_bucket", "_sum", "_count")}
        used = set(re.findall(r"\bstrictproxy_\w+", asked))
        self.assertEqual(used - known, set())
        self.assertGreater(len(used), 15)


class ChartTests(SynchronousTestCase):
    chart = ROOT / "k8s" / "chart"

    def render(self, *arguments: str) -> list[dict[str, Any]]:
        helm = str(Path(sys.executable).parent / "helm")
        done = subprocess.run(
            [helm, "template", "proxy", str(self.chart), *arguments],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        self.assertEqual(done.returncode, 0, done.stderr)
        return [each for each in yaml.safe_load_all(done.stdout) if each]

    def check(self, manifests: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
        for manifest in manifests:
            if manifest["kind"] not in CUSTOM:
                kubernetes_validate.validate(manifest, KUBERNETES, strict=True)
        by_kind = {manifest["kind"]: manifest for manifest in manifests}
        content = by_kind["ConfigMap"]["data"]["strictproxy.yaml"]
        config = parse(content, "strictproxy.yaml", {"POD_NAMESPACE": "media"})
        pod = by_kind["Deployment"]["spec"]["template"]["spec"]
        self.assertGreater(pod["terminationGracePeriodSeconds"], config.drain_timeout)
        mounted = {mount["name"] for mount in pod["containers"][0]["volumeMounts"]}
        self.assertEqual(mounted, {volume["name"] for volume in pod["volumes"]})
        return by_kind

    def test_defaults(self) -> None:
        """As it is, the chart is valid, and its pod is as confined as the base's."""
        by_kind = self.check(self.render())
        self.assertNotIn("Role", by_kind)
        base = {m["metadata"]["name"]: m for m in documents(BASE) if m["kind"] == "Deployment"}
        ours, theirs = (
            each["spec"]["template"]["spec"]
            for each in (by_kind["Deployment"], base["strictproxy"])
        )
        self.assertEqual(
            ours["containers"][0]["securityContext"], theirs["containers"][0]["securityContext"]
        )
        self.assertLessEqual(theirs["securityContext"].items(), ours["securityContext"].items())
        for probe in ("startupProbe", "livenessProbe", "readinessProbe", "lifecycle"):
            self.assertEqual(ours["containers"][0][probe], theirs["containers"][0][probe])

    def test_everything(self) -> None:
        """With every option it is valid too."""
        by_kind = self.check(
            self.render(
                "--set", "headless.create=true,headless.selector.app=x,endpointSlices=true",
                "--set", "podMonitor.enabled=true,podMonitor.labels.a=b,adminTokenSecret=t",
                "--set", "tasks.storage=20Gi,tasks.storageClassName=fast",
                "--set", "tlsSecret=c,podLabels.x=y,podAnnotations.x=y,nodeSelector.x=y",
                "--set", "service.annotations.x=y,serviceAccount.annotations.x=y",
                "--set", "networkPolicy.adminFromNamespaces={monitoring}",
                "--set", "imagePullSecrets[0].name=s",
                "--set", "tolerations[0].key=k,tolerations[0].operator=Exists",
                "--set", "extraVolumes[0].name=e,extraVolumes[0].emptyDir.medium=Memory",
                "--set", "extraVolumeMounts[0].name=e,extraVolumeMounts[0].mountPath=/e",
            )
        )  # fmt: skip
        self.assertIs(
            by_kind["Deployment"]["spec"]["template"]["spec"]["automountServiceAccountToken"], True
        )
        overlay = ROOT / "k8s" / "overlays" / "endpointslices" / "rbac.yaml"
        role, _ = yaml.safe_load_all(overlay.read_text())
        self.assertEqual(by_kind["Role"]["rules"], role["rules"])

    def test_says_what_is_missing(self) -> None:
        """A headless Service for no pods is refused."""
        with self.assertRaisesRegex(AssertionError, "headless.selector: which pods"):
            self.render("--set", "headless.create=true")


class ExampleTests(SynchronousTestCase):
    def test_transcoding(self) -> None:
        """The example's manifests are valid, and its configuration names its Service."""
        folder = ROOT / "examples" / "transcoding"
        manifests = list(yaml.safe_load_all((folder / "k8s" / "transcoding.yaml").read_text()))
        for manifest in manifests:
            kubernetes_validate.validate(manifest, KUBERNETES, strict=True)
        source = load(folder / "strictproxy.yaml", {}).upstreams["transcode"].source
        assert isinstance(source, DnsSource)
        _, service = manifests
        self.assertEqual(source.name, service["metadata"]["name"])
        self.assertEqual(source.port, service["spec"]["ports"][0]["port"])


class DockerfileTests(SynchronousTestCase):
    def test_hadolint(self) -> None:
        """The Dockerfiles are clean."""
        for file in (ROOT / "Dockerfile", ROOT / "examples" / "transcoding" / "Dockerfile"):
            done = subprocess.run(
                [str(Path(sys.executable).parent / "hadolint"), "--ignore", "DL3008", str(file)],
                capture_output=True, text=True, check=False,
            )  # fmt: skip
            self.assertEqual((done.returncode, done.stdout), (0, ""))

    def test_says_what_the_manifests_rely_on(self) -> None:
        """The image runs as the user of the manifests, with what it copies being there."""
        text = (ROOT / "Dockerfile").read_text()
        self.assertIn("USER 65532:65532", text)
        for line in re.findall(r"^COPY (?!--)(.*) \S+$", text, re.MULTILINE):
            for name in line.split():
                self.assertTrue((ROOT / name).exists(), name)
