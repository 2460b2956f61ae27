// The official conformance suite of Gateway API against the mesh in the cluster of $KUBECONFIG.
// ./run says how it is started; all flags are the suite's own.
package conformance

import (
	"context"
	"os"
	"testing"

	gatewayv1 "sigs.k8s.io/gateway-api/apis/v1"
	"sigs.k8s.io/gateway-api/conformance"
)

func TestConformance(t *testing.T) {
	options := conformance.DefaultOptions(t)
	hostname := gatewayv1.HostnameAddressType
	options.UsableNetworkAddresses = []gatewayv1.GatewaySpecAddress{{
		Type:  &hostname,
		Value: "infra-backend-v1.gateway-conformance-infra.svc.cluster.local",
	}}
	options.UnusableNetworkAddresses = []gatewayv1.GatewaySpecAddress{{Type: &hostname, Value: "nowhere"}}
	if pool := os.Getenv("OUTRIGGER_ADDRESSES"); pool != "" {
		ctx, end := context.WithCancel(context.Background())
		// Tests that run beside each other begin when this function has returned.
		t.Cleanup(end)
		go assignAddresses(ctx, t, options.Clientset, pool)
	}
	conformance.RunConformanceWithOptions(t, options)
}
