"""Manifests and Dockerfile: valid, consistent with each other, and with what the proxy does."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import kubernetes_validate
import yaml
from twisted.trial.unittest import SynchronousTestCase

from strictproxy.config import DnsSource, load
from strictproxy.config.model import KubernetesSource

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


class DockerfileTests(SynchronousTestCase):
    def test_hadolint(self) -> None:
        """The Dockerfile is clean."""
        done = subprocess.run(
            [str(Path(sys.executable).parent / "hadolint"), str(ROOT / "Dockerfile")],
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
