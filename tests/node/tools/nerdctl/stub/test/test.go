// Package test is empty: nothing in the nerdctl binary uses it.
package test
