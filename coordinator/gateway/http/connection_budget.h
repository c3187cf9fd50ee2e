/* ConnectionBudget: how many clients' connections the HTTP servers of one process may have
 * together, so that they never take its last file descriptors. Any thread. */
#pragma once

#include <glib.h>
#include <stdbool.h>

typedef struct ConnectionBudget ConnectionBudget;

ConnectionBudget *connection_budget_new(unsigned connections); /* one reference */
/* What this process's limit of open files leaves, less what workers' and operators' connections
 * and the stores need: 256 files, or half of fewer than 512. */
unsigned connection_budget_of_files(void);
ConnectionBudget *connection_budget_ref(ConnectionBudget *budget);
void connection_budget_unref(ConnectionBudget *budget); /* NULL-safe */
unsigned connection_budget_size(const ConnectionBudget *budget);

/* True: one more, to be given back. False: none is left; `wake_fd`, an eventfd, is written once as
 * soon as one is given back. */
bool connection_budget_take(ConnectionBudget *budget, int wake_fd);
void connection_budget_give(ConnectionBudget *budget);
/* `wake_fd` is written no more once this has returned. */
void connection_budget_forget(ConnectionBudget *budget, int wake_fd);

G_DEFINE_AUTOPTR_CLEANUP_FUNC(ConnectionBudget, connection_budget_unref)
