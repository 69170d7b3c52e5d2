/*
 * Holds a pod's namespaces: waits until it is told to end, and reaps the children of a shared PID namespace.
 *
 * Signals are blocked and taken one by one instead of being handled: a blocked signal reaches PID 1 too, for which the
 * kernel drops those with a default action, and nothing can arrive between a check and a wait.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <signal.h>
#include <stdio.h>
#include <sys/wait.h>

int main(void)
{
	sigset_t signals;

	sigemptyset(&signals);
	sigaddset(&signals, SIGCHLD);
	sigaddset(&signals, SIGINT);
	sigaddset(&signals, SIGTERM);
	if (sigprocmask(SIG_BLOCK, &signals, NULL) != 0) {
		perror("pause: sigprocmask");
		return 1;
	}
	for (;;) {
		switch (sigwaitinfo(&signals, NULL)) {
		case SIGINT:
		case SIGTERM:
			return 0;
		case SIGCHLD:
			/* One signal may stand for several children. */
			while (waitpid(-1, NULL, WNOHANG) > 0)
				;
			break;
		case -1:
			if (errno != EINTR) {
				perror("pause: sigwaitinfo");
				return 1;
			}
		}
	}
}
