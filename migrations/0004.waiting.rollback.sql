drop table waiting;
