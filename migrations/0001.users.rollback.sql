drop table users;

drop table pools;
