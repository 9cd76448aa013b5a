// Kubernetes decodes manifests as an API server does that takes no unknown
// field, with the types of Kubernetes and of the Prometheus operator:
//
//	go run . ../../docs/devops/kubernetes
//
// What one manifest names in another must be there, and each pod must pass the
// Pod Security Standard "restricted". With -token-request it reads a pod of
// docs/devops/workloads.md, and prints what the kubelet asks for it.
package main

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"

	monitoring "github.com/prometheus-operator/prometheus-operator/pkg/apis/monitoring/v1"
	apps "k8s.io/api/apps/v1"
	batch "k8s.io/api/batch/v1"
	core "k8s.io/api/core/v1"
	networking "k8s.io/api/networking/v1"
	disruption "k8s.io/api/policy/v1"
	meta "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/serializer"
	"k8s.io/apimachinery/pkg/util/intstr"
	"k8s.io/apimachinery/pkg/util/validation"
	"k8s.io/apimachinery/pkg/util/yaml"
	security "k8s.io/pod-security-admission/api"
	"k8s.io/pod-security-admission/policy"
)

// A folder is all that its manifests declare.
type folder struct {
	pods     []core.PodTemplateSpec
	secrets  []*core.Secret
	services []*core.Service
	others   []runtime.Object
	faults   []string
	count    int
}

func main() {
	if len(os.Args) != 2 {
		fmt.Fprintln(os.Stderr, "usage: kubernetes FOLDER | -token-request")
		os.Exit(64)
	}
	if os.Args[1] == "-token-request" {
		if err := printRequest(); err != nil {
			fmt.Fprintln(os.Stderr, "kubernetes:", err)
			os.Exit(1)
		}
		return
	}
	f := &folder{}
	names, err := filepath.Glob(filepath.Join(os.Args[1], "*.yaml*"))
	for _, name := range names {
		if err == nil {
			err = f.read(name)
		}
	}
	if err == nil && f.count+len(f.faults) == 0 {
		err = errors.New("there are no manifests")
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "kubernetes:", err)
		os.Exit(1)
	}
	f.check()
	for _, fault := range f.faults {
		fmt.Println(fault)
	}
	fmt.Printf("kubernetes: %d manifests, %d faults\n", f.count, len(f.faults))
	if len(f.faults) > 0 {
		os.Exit(1)
	}
}

func (f *folder) fault(format string, args ...any) {
	f.faults = append(f.faults, fmt.Sprintf(format, args...))
}

func (f *folder) read(name string) error {
	scheme := runtime.NewScheme()
	if err := errors.Join(core.AddToScheme(scheme), apps.AddToScheme(scheme), batch.AddToScheme(scheme), networking.AddToScheme(scheme),
		disruption.AddToScheme(scheme), monitoring.AddToScheme(scheme)); err != nil {
		return err
	}
	strict := serializer.NewCodecFactory(scheme, serializer.EnableStrict).UniversalDeserializer()
	text, err := os.ReadFile(name)
	if err != nil {
		return err
	}
	for documents := yaml.NewDocumentDecoder(io.NopCloser(bytes.NewReader(text))); ; {
		document := make([]byte, len(text)+1)
		n, err := documents.Read(document)
		if err == io.EOF {
			return nil
		}
		if err != nil {
			return fmt.Errorf("%s: %w", name, err)
		}
		object, _, err := strict.Decode(document[:n], nil, nil)
		if err != nil {
			f.fault("%s: %v", name, err)
			continue
		}
		f.add(object)
	}
}

func (f *folder) add(object runtime.Object) {
	f.count++
	named := object.(meta.Object)
	for _, problem := range validation.IsDNS1123Subdomain(named.GetName()) {
		f.fault("%s: %s", named.GetName(), problem)
	}
	if named.GetNamespace() != "" {
		f.fault("%s has a namespace, and is for any", named.GetName())
	}
	switch o := object.(type) {
	case *apps.Deployment:
		f.pods = append(f.pods, o.Spec.Template)
		f.selects(o.Name, o.Spec.Selector)
		if selector, err := meta.LabelSelectorAsSelector(o.Spec.Selector); err == nil && !selector.Matches(labels.Set(o.Spec.Template.Labels)) {
			f.fault("the pods of %s don't have the labels by which it finds them", o.Name)
		}
		for _, spread := range o.Spec.Template.Spec.TopologySpreadConstraints {
			f.selects(o.Name+", spread", spread.LabelSelector)
		}
	case *batch.CronJob:
		f.pods = append(f.pods, o.Spec.JobTemplate.Spec.Template)
		if restart := o.Spec.JobTemplate.Spec.Template.Spec.RestartPolicy; restart != core.RestartPolicyNever && restart != core.RestartPolicyOnFailure {
			f.fault("the pods of %s are restarted %q, which a job's can't be", o.Name, restart)
		}
	case *core.Secret:
		f.secrets = append(f.secrets, o)
		for key, value := range o.StringData {
			if value != "" {
				f.fault("the secret %s has a value for %s", o.Name, key)
			}
		}
	case *core.Service:
		f.services = append(f.services, o)
	default:
		f.others = append(f.others, o)
	}
}

// selects wants some pod to be selected.
func (f *folder) selects(who string, by *meta.LabelSelector) (found []core.PodTemplateSpec) {
	selector, err := meta.LabelSelectorAsSelector(by)
	if err != nil {
		f.fault("%s: %v", who, err)
		return nil
	}
	for _, pod := range f.pods {
		if selector.Matches(labels.Set(pod.Labels)) {
			found = append(found, pod)
		}
	}
	if len(found) == 0 || selector.Empty() {
		f.fault("%s selects none of the pods, or all there are", who)
	}
	return found
}

// hasPort wants one of the pods to have a port.
func (f *folder) hasPort(who string, pods []core.PodTemplateSpec, port intstr.IntOrString) {
	for _, pod := range pods {
		for _, c := range pod.Spec.Containers {
			for _, p := range c.Ports {
				if p.Name == port.StrVal || port.Type == intstr.Int && p.ContainerPort == port.IntVal {
					return
				}
			}
		}
	}
	f.fault("%s leads to the port %s, which no pod has", who, port.String())
}

func (f *folder) service(who, name string, port networking.ServiceBackendPort) {
	for _, s := range f.services {
		if s.Name == name && slices.ContainsFunc(s.Spec.Ports, func(p core.ServicePort) bool {
			return p.Name == port.Name && port.Number == 0 || p.Port == port.Number
		}) {
			return
		}
	}
	f.fault("%s leads to the service %s, port %q, %d, which is not there", who, name, port.Name, port.Number)
}

func (f *folder) check() {
	standard, err := policy.NewEvaluator(policy.DefaultChecks(), nil)
	if err != nil {
		f.fault("%v", err)
		return
	}
	for _, pod := range f.pods {
		f.checkPod(pod, standard)
	}
	for _, s := range f.services {
		pods := f.selects("the service "+s.Name, &meta.LabelSelector{MatchLabels: s.Spec.Selector})
		if len(pods) > 1 {
			f.fault("the service %s leads to pods of several kinds", s.Name)
		}
		for _, p := range s.Spec.Ports {
			f.hasPort("the service "+s.Name, pods, p.TargetPort)
		}
	}
	for _, object := range f.others {
		switch o := object.(type) {
		case *disruption.PodDisruptionBudget:
			f.selects("the budget "+o.Name, o.Spec.Selector)
		case *networking.NetworkPolicy:
			pods := f.selects("the policy "+o.Name, &o.Spec.PodSelector)
			if len(pods) != len(f.pods) {
				f.fault("the policy %s is not for all pods", o.Name)
			}
			for _, rule := range o.Spec.Ingress {
				for _, p := range rule.Ports {
					f.hasPort("the policy "+o.Name, pods, *p.Port)
				}
			}
		case *networking.Ingress:
			for _, rule := range o.Spec.Rules {
				for _, path := range rule.HTTP.Paths {
					f.service("the path "+path.Path, path.Backend.Service.Name, path.Backend.Service.Port)
				}
			}
		case *monitoring.ServiceMonitor:
			selector, err := meta.LabelSelectorAsSelector(&o.Spec.Selector)
			if err != nil {
				f.fault("%v", err)
				continue
			}
			watched := 0
			for _, s := range f.services {
				if !selector.Matches(labels.Set(s.Labels)) {
					continue
				}
				watched++
				for _, e := range o.Spec.Endpoints {
					f.service("the monitor "+o.Name, s.Name, networking.ServiceBackendPort{Name: e.Port})
				}
				if job := s.Labels[o.Spec.JobLabel]; job != "agentidp" { // as alerts.yml has it
					f.fault("the monitor %s names its job %q", o.Name, job)
				}
			}
			if watched != 1 {
				f.fault("the monitor %s selects %d services: each pod would be asked as often", o.Name, watched)
			}
		default:
			f.fault("nothing is known here of a %T", o)
		}
	}
}

func (f *folder) checkPod(pod core.PodTemplateSpec, standard policy.Evaluator) {
	restricted := security.LevelVersion{Level: security.LevelRestricted, Version: security.LatestVersion()}
	for _, result := range standard.EvaluatePod(restricted, &pod.ObjectMeta, &pod.Spec) {
		if !result.Allowed {
			f.fault("the pod with %v is not restricted: %s, %s", pod.Labels, result.ForbiddenReason, result.ForbiddenDetail)
		}
	}
	if s := pod.Spec.SecurityContext; s == nil || s.RunAsUser == nil || s.FSGroup == nil || s.RunAsGroup == nil || *s.FSGroup != *s.RunAsGroup {
		f.fault("the pod with %v has no user and no group that may read its files", pod.Labels)
	}
	if pod.Spec.AutomountServiceAccountToken == nil || *pod.Spec.AutomountServiceAccountToken {
		f.fault("the pod with %v gets a token of the cluster", pod.Labels)
	}
	keys := map[string][]string{} // by the volume
	for _, v := range pod.Spec.Volumes {
		if v.Secret == nil {
			f.fault("the volume %s is no secret", v.Name)
			continue
		}
		if v.Secret.DefaultMode == nil || *v.Secret.DefaultMode != 0o440 {
			f.fault("the files of %s are not only their group's to read", v.Name)
		}
		i := slices.IndexFunc(f.secrets, func(s *core.Secret) bool { return s.Name == v.Secret.SecretName })
		if i < 0 {
			f.fault("the secret %s is not there", v.Secret.SecretName)
			continue
		}
		for key := range f.secrets[i].StringData {
			keys[v.Name] = append(keys[v.Name], key)
		}
	}
	for _, c := range pod.Spec.Containers {
		if c.SecurityContext.ReadOnlyRootFilesystem == nil || !*c.SecurityContext.ReadOnlyRootFilesystem {
			f.fault("%s may write to its image", c.Name)
		}
		if c.Resources.Limits.Memory().IsZero() || c.Resources.Requests.Cpu().IsZero() {
			f.fault("%s has no limit of memory, or asks for no processor", c.Name)
		}
		files := map[string]bool{}
		for _, m := range c.VolumeMounts {
			if keys[m.Name] == nil || m.SubPath != "" || !m.ReadOnly {
				f.fault("%s mounts %s, which is not there, can be written to or won't change", c.Name, m.Name)
			}
			for _, key := range keys[m.Name] {
				files[m.MountPath+"/"+key] = true
			}
		}
		for _, e := range c.Env {
			if strings.HasSuffix(e.Name, "_FILE") && !files[e.Value] {
				f.fault("%s has %s=%s, which is in none of its secrets", c.Name, e.Name, e.Value)
			}
		}
		for _, probe := range []*core.Probe{c.StartupProbe, c.ReadinessProbe, c.LivenessProbe} {
			if probe != nil && probe.HTTPGet != nil {
				f.hasPort("a probe of "+c.Name, []core.PodTemplateSpec{pod}, probe.HTTPGet.Port)
			}
		}
	}
}
