package conformance

import (
	"context"
	"net/netip"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"
)

// assignAddresses is the load balancer of a cluster that has none: every Service that waits for an address gets one of
// pool, the one that it asks for if it asks for one. kube-proxy answers there.
func assignAddresses(ctx context.Context, t *testing.T, client kubernetes.Interface, pool string) {
	prefix, err := netip.ParsePrefix(pool)
	if err != nil {
		t.Errorf("OUTRIGGER_ADDRESSES: %v", err)
		return
	}
	for ctx.Err() == nil {
		if err := assignOnce(ctx, client, prefix); err != nil && ctx.Err() == nil {
			t.Logf("load balancer: %v", err)
		}
		time.Sleep(200 * time.Millisecond)
	}
}

func assignOnce(ctx context.Context, client kubernetes.Interface, prefix netip.Prefix) error {
	services, err := client.CoreV1().Services("").List(ctx, metav1.ListOptions{})
	if err != nil {
		return err
	}
	used := map[string]bool{}
	var waiting []*corev1.Service
	for i := range services.Items {
		service := &services.Items[i]
		if service.Spec.Type != corev1.ServiceTypeLoadBalancer {
			continue
		}
		if len(service.Status.LoadBalancer.Ingress) == 0 {
			waiting = append(waiting, service)
		}
		for _, ingress := range service.Status.LoadBalancer.Ingress {
			used[ingress.IP] = true
		}
	}
	next := prefix.Addr().Next()
	for _, service := range waiting {
		address := service.Spec.LoadBalancerIP
		if address != "" {
			if asked, err := netip.ParseAddr(address); err != nil || !prefix.Contains(asked) || used[address] {
				continue
			}
		} else {
			for used[next.String()] {
				next = next.Next()
			}
			if !prefix.Contains(next) {
				continue
			}
			address = next.String()
		}
		used[address] = true
		service.Status.LoadBalancer.Ingress = []corev1.LoadBalancerIngress{{IP: address}}
		if _, err := client.CoreV1().Services(service.Namespace).UpdateStatus(ctx, service, metav1.UpdateOptions{}); err != nil {
			return err
		}
	}
	return nil
}
