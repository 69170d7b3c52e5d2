// Package testca is empty: nothing in the nerdctl binary uses it.
package testca
