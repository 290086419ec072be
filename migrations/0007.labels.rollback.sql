drop index users_by_labels;
