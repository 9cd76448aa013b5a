package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"

	authentication "k8s.io/api/authentication/v1"
	core "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/serializer"
)

// A requested is the TokenRequest that the kubelet makes for a pod, and whose it is.
type requested struct {
	Namespace, ServiceAccount, Pod string
	Request                        authentication.TokenRequest
}

// printRequest reads a pod from standard input, and prints the TokenRequest of its
// projected token.
func printRequest() error {
	text, err := io.ReadAll(os.Stdin)
	if err != nil {
		return err
	}
	scheme := runtime.NewScheme()
	if err := core.AddToScheme(scheme); err != nil {
		return err
	}
	object, _, err := serializer.NewCodecFactory(scheme, serializer.EnableStrict).UniversalDeserializer().Decode(text, nil, nil)
	if err != nil {
		return err
	}
	pod, ok := object.(*core.Pod)
	if !ok {
		return fmt.Errorf("it is a %T", object)
	}
	for _, v := range pod.Spec.Volumes {
		if v.Projected == nil {
			continue
		}
		for _, source := range v.Projected.Sources {
			if source.ServiceAccountToken == nil {
				continue
			}
			for _, container := range pod.Spec.Containers {
				if !slices.ContainsFunc(container.VolumeMounts, func(m core.VolumeMount) bool { return m.Name == v.Name && m.ReadOnly }) {
					return fmt.Errorf("%s does not mount the token", container.Name)
				}
			}
			return json.NewEncoder(os.Stdout).Encode(requested{pod.Namespace, pod.Spec.ServiceAccountName, pod.Name, authentication.TokenRequest{
				Spec: authentication.TokenRequestSpec{
					Audiences: []string{source.ServiceAccountToken.Audience}, ExpirationSeconds: source.ServiceAccountToken.ExpirationSeconds,
					BoundObjectRef: &authentication.BoundObjectReference{Kind: "Pod", APIVersion: "v1", Name: pod.Name},
				},
			}})
		}
	}
	return errors.New("the pod has no projected token")
}
