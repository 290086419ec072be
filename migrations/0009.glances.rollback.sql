drop index users_by_login;

drop index locks_quarantined;

drop index history_by_end;
