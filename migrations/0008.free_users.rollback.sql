drop view free_users;
